"""Text becomes tokens and labels, and a row has an outcome: kept, cut, or the reason why it cannot be trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .layouts import Dropped
from .rendering import Rendered, Renderer, RenderSettings, Spans

KEPT, CUT = "kept", "cut"
TOKEN_COLUMNS = {
    "sft": ["input_ids", "labels"],
    "rm": ["chosen_ids", "rejected_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
}

Tokens = tuple[list[int], Spans]


def tokenize(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Return `(ids, spans in tokens)` of each text. A token that lies across the border of a span belongs to it."""
    result: dict[int, Tokens] = {}
    for templated in (True, False):  # a template writes the special tokens itself
        group = [i for i, text in enumerate(texts) if text.templated is templated]
        if not group:
            continue
        batch = tokenizer([texts[i].text for i in group], add_special_tokens=not templated, return_attention_mask=False)
        for row, i in enumerate(group):
            ids, text = batch["input_ids"][row], texts[i]
            spans = [(0, len(ids))] if text.spans is None else [span_tokens(batch, row, *span) for span in text.spans]
            if text.spans and text.spans[-1][1] == len(text.text):
                spans[-1] = (spans[-1][0], len(ids))  # with what the tokenizer adds at the end
            result[i] = (ids, spans)
    return [result[i] for i in range(len(texts))]


def span_tokens(batch: BatchEncoding, row: int, start: int, end: int) -> tuple[int, int]:
    """Return the tokens of the characters `start:end` of a row."""
    chars = range(start, end)  # of which the tokenizer may drop some, such as spaces
    first = next((token for c in chars if (token := batch.char_to_token(row, c)) is not None), None)
    if first is None:
        length = len(batch["input_ids"][row])
        return length, length
    last = next(token for c in reversed(chars) if (token := batch.char_to_token(row, c)) is not None)
    return first, last + 1


def finish_sft(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, Any]:
    [(ids, spans)] = texts
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    outcome = KEPT
    if settings.max_length is not None and len(ids) > settings.max_length:
        ids, labels, outcome = ids[: settings.max_length], labels[: settings.max_length], CUT
    if labels.count(-100) == len(labels):
        outcome = f"nothing to train on{' within max_length' if outcome == CUT else ''}"
    return {"input_ids": ids, "labels": labels, "outcome": outcome}


def finish_rm(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, Any]:
    (chosen, _), (rejected, _) = texts
    outcome = KEPT
    if chosen == rejected:
        outcome = "chosen equals rejected"
    elif settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
        outcome = "longer than max_length"
    return {"chosen_ids": chosen, "rejected_ids": rejected, "outcome": outcome}


def finish_dpo(texts: Sequence[Tokens], settings: RenderSettings) -> dict[str, Any]:
    (chosen, [(chosen_start, _)]), (rejected, [(rejected_start, _)]) = texts
    prompt = min(chosen_start, rejected_start)
    while chosen[:prompt] != rejected[:prompt]:
        prompt -= 1
    outcome = KEPT
    if settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
        chosen, rejected, outcome = chosen[: settings.max_length], rejected[: settings.max_length], CUT
    if min(len(chosen), len(rejected)) <= prompt:
        outcome = "the prompt fills max_length" if outcome == CUT else "empty answer"
    elif chosen == rejected:
        outcome = f"chosen equals rejected{' within max_length' if outcome == CUT else ''}"
    answers = {"chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
    return {"prompt_ids": chosen[:prompt], **answers, "outcome": outcome}


FINISH = {"sft": finish_sft, "rm": finish_rm, "dpo": finish_dpo}


def token_features(settings: RenderSettings) -> Features:
    """Return the columns of [`process_batch`]."""
    features = {name: List(Value("int32")) for name in TOKEN_COLUMNS[settings.task]} | {"outcome": Value("string")}
    extra = {"margin": Value("float32"), "subset": Value("string")}
    return Features(features | {name: feature for name, feature in extra.items() if name in settings.columns})


def process_batch(batch: Mapping[str, list[Any]], settings: RenderSettings) -> dict[str, list[Any]]:
    """Turn columns of raw rows into columns of tokens with an outcome for each row, none left out."""
    renderer, finish = Renderer(settings), FINISH[settings.task]
    columns = token_features(settings)
    result, rendered = [], []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        out: dict[str, object] = {name: [] if name in TOKEN_COLUMNS[settings.task] else None for name in columns}
        try:
            if "subset" in columns:
                out["subset"] = str(row[settings.columns["subset"]])
            if "margin" in columns:
                out["margin"] = read_margin(row[settings.columns["margin"]])
            rendered.append((out, renderer.render(row)))
        except Dropped as reason:
            out["outcome"] = str(reason)
        result.append(out)
    tokens = iter(tokenize([text for _, texts in rendered for text in texts], settings.tokenizer))
    for out, texts in rendered:
        out |= finish([next(tokens) for _ in texts], settings)
    return {name: [out[name] for out in result] for name in columns}


def read_margin(value: Any) -> float:  # noqa: ANN401 - the user's
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Dropped("margin is not a number") from error
