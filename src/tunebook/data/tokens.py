"""Text becomes tokens and labels, and a row has an outcome: kept, cut, or the reason why it cannot be trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .pairs import EQUAL
from .rendering import Rendered, Renderer, RenderSettings, Spans
from .tokenizer import added_ids
from .turns import Dropped, Users, parse_json

KEPT, CUT = "kept", "cut"
TOKEN_COLUMNS = {
    "sft": ["input_ids", "labels"],
    "rm": ["chosen_ids", "rejected_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
}

Tokens = tuple[list[int], Spans]


def tokenize(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Return `(ids, spans in tokens)` of each text. A token that lies across the border of a span belongs to it.

    What the tokenizer puts before a text stands there, as BOS, unless a template has written the text. What it puts
    after one does not: a text has its end already.
    """
    result: dict[int, Tokens] = {}
    for templated in (True, False):
        group = [i for i, text in enumerate(texts) if text.templated is templated]
        if not group:
            continue
        batch = tokenizer([texts[i].text for i in group], add_special_tokens=not templated, return_attention_mask=False)
        added = 0 if templated else len(added_ids(tokenizer)[1])
        for row, i in enumerate(group):
            ids, text = batch["input_ids"][row], texts[i]
            ids = ids[: len(ids) - added]
            spans = [(0, len(ids))] if text.spans is None else [span_tokens(batch, row, *span) for span in text.spans]
            result[i] = (ids, spans)
    return [result[i] for i in range(len(texts))]


def span_tokens(batch: BatchEncoding, row: int, start: int, end: int) -> tuple[int, int]:
    """Return the tokens that carry a part of the characters `start:end` of a row."""
    chars = range(start, end)  # of which the tokenizer may drop some, such as spaces
    first = next((token for c in chars if (token := batch.char_to_token(row, c)) is not None), None)
    if first is None:
        length = len(batch["input_ids"][row])
        return length, length
    last = next(token for c in reversed(chars) if (token := batch.char_to_token(row, c)) is not None)
    # A character that is several tokens is found as its first
    while (span := batch.token_to_chars(row, last + 1)) is not None and span.start < end:
        last += 1
    return first, last + 1


def finish_sft(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, object]:
    [(ids, spans)] = texts
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    outcome = KEPT
    if settings.max_length is not None and len(ids) > settings.max_length:
        outcome = CUT
        if not settings.splits:
            ids, labels = ids[: settings.max_length], labels[: settings.max_length]
    if labels.count(-100) == len(labels):
        outcome = f"nothing to train on{' within max_length' if outcome == CUT else ''}"
    return {"input_ids": ids, "labels": labels, "outcome": outcome}


def finish_rm(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, object]:
    (chosen, _), (rejected, _) = texts
    outcome = KEPT
    if chosen == rejected:
        outcome = EQUAL
    elif settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
        outcome = "longer than max_length"
    return {"chosen_ids": chosen, "rejected_ids": rejected, "outcome": outcome}


def finish_dpo(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, object]:
    (chosen, [(chosen_start, _)]), (rejected, [(rejected_start, _)]) = texts
    prompt = min(chosen_start, rejected_start)
    while chosen[:prompt] != rejected[:prompt]:  # where letters of the prompt and the answers share a token
        prompt -= 1
    outcome = KEPT
    if settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
        chosen, rejected, outcome = chosen[: settings.max_length], rejected[: settings.max_length], CUT
    if min(len(chosen), len(rejected)) <= prompt:
        outcome = "the prompt fills max_length" if outcome == CUT else "empty answer"
    elif chosen == rejected:
        outcome = f"{EQUAL}{' within max_length' if outcome == CUT else ''}"
    answers = {"chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
    return {"prompt_ids": chosen[:prompt], **answers, "outcome": outcome}


FINISH = {"sft": finish_sft, "rm": finish_rm, "dpo": finish_dpo}


def token_features(settings: RenderSettings) -> Features:
    """Return the columns of [`process_batch`]."""
    features = {name: List(Value("int32")) for name in TOKEN_COLUMNS[settings.task]}
    features |= {"outcome": Value("string"), "note": Value("string")}
    extra = {"margin": Value("float32"), "subset": Value("string")}
    return Features(features | {name: feature for name, feature in extra.items() if name in settings.layout.columns})


def process_batch(batch: Mapping[str, list[Any]], renderer: Renderer) -> dict[str, list[Any]]:
    """Turn columns of raw rows into columns of tokens, with the outcome of each row, none left out.

    The note of a row that is kept says what is wrong with it, that of another shows its reason.
    """
    settings = renderer.settings
    finish, columns = FINISH[settings.task], token_features(settings)
    result, rendered = [], []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        out: dict[str, object] = {name: [] if name in TOKEN_COLUMNS[settings.task] else None for name in columns}
        try:
            if "subset" in columns:
                out["subset"] = str(row[settings.layout.columns["subset"]])
            if "margin" in columns:
                out["margin"] = read_margin(row[settings.layout.columns["margin"]])
            if settings.layout.name == "tokens":
                out |= finish_sft([read_tokens(row, settings)], settings)
            else:
                rendered.append((out, renderer.render(row)))
        except Dropped as dropped:
            out |= {"outcome": dropped.reason, "note": dropped.example or None}
        result.append(out)
    tokens = iter(tokenize([text for _, texts in rendered for text in texts], settings.tokenizer))
    for out, texts in rendered:
        out |= finish([next(tokens) for _ in texts], settings)
        if out["outcome"] in (KEPT, CUT):
            out["note"] = next((text.flaw for text in texts if text.flaw), None)
    return {name: [out[name] for out in result] for name in columns}


def read_tokens(row: Mapping[str, Any], settings: RenderSettings) -> Tokens:
    """Return the ids of a row that is tokens already, and the spans of its labels."""
    columns = settings.layout.columns
    values = {role: row[column] for role, column in columns.items()}
    values = {role: parse_json(v, role) if isinstance(v, str) else v for role, v in values.items() if v is not None}
    ids, size = values.get("input_ids"), len(settings.tokenizer)
    if not ids:
        raise Dropped("empty input_ids")
    for role, given in values.items():
        if not isinstance(given, list) or any(type(value) not in (int, bool) for value in given):
            raise Dropped(f"{role} are not a list of whole numbers")
        if len(given) != len(ids):
            raise Dropped(f"{role} are not as many as input_ids", f"{len(given)} and {len(ids)}")
    if not 0 <= min(ids) <= max(ids) < size:
        raise Dropped("an id is not in the vocabulary", f"{min(ids)} to {max(ids)}, of {size}")
    labels = values.get("labels", ids)
    if any(label not in (-100, token) for label, token in zip(labels, ids, strict=True)):
        raise Dropped("a label is neither -100 nor its id")
    kept = values.get("completion_mask", [True] * len(ids))
    mask = [label != -100 and bool(keep) for label, keep in zip(labels, kept, strict=True)]
    edges = [i for i in range(len(ids) + 1) if (i > 0 and mask[i - 1]) != (i < len(ids) and mask[i])]
    return ids, list(zip(edges[::2], edges[1::2], strict=True))


def read_margin(value: Users) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Dropped("margin is not a number") from error
