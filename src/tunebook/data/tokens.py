"""Text becomes tokens and labels: loss masks, cuts, pairs, and an outcome for each row.

An outcome is kept, cut, or the reason why the row cannot be trained on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .layouts import Dropped
from .rendering import Rendered, Renderer, RenderSettings

KEPT, CUT = "kept", "cut"
TOKEN_COLUMNS = {
    "sft": ["input_ids", "labels"],
    "rm": ["chosen_ids", "rejected_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
}


def tokenize(
    texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """`(ids, spans in tokens)` of each text. A token that lies across the border of a span belongs to it."""
    result: list[Any] = [None] * len(texts)
    for templated in (True, False):  # a template writes the special tokens itself
        chosen = [i for i, text in enumerate(texts) if text.templated is templated]
        if not chosen:
            continue
        batch = tokenizer(
            [texts[i].text for i in chosen], add_special_tokens=not templated, return_attention_mask=False
        )
        for row, i in enumerate(chosen):
            ids, text = batch["input_ids"][row], texts[i]
            spans = [(0, len(ids))] if text.spans is None else [span_tokens(batch, row, *span) for span in text.spans]
            if text.spans and text.spans[-1][1] == len(text.text):
                spans[-1] = (spans[-1][0], len(ids))  # with what the tokenizer adds at the end
            result[i] = (ids, spans)
    return result


def span_tokens(batch: BatchEncoding, row: int, start: int, end: int) -> tuple[int, int]:
    """The tokens of the characters `start:end` of a row; a tokenizer may drop some characters, such as spaces."""
    chars = range(start, end)
    first = next((token for c in chars if (token := batch.char_to_token(row, c)) is not None), None)
    if first is None:
        length = len(batch["input_ids"][row])
        return length, length
    last = next(token for c in reversed(chars) if (token := batch.char_to_token(row, c)) is not None)
    return first, last + 1


def finish_sft(rows: Iterable[Any], settings: RenderSettings) -> Iterable[dict[str, Any]]:
    for ids, spans in rows:
        labels = [-100] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        outcome = KEPT
        if settings.max_length is not None and len(ids) > settings.max_length:
            ids, labels, outcome = ids[: settings.max_length], labels[: settings.max_length], CUT
        if labels.count(-100) == len(labels):
            outcome = f"nothing to train on{' within max_length' if outcome == CUT else ''}"
        yield {"input_ids": ids, "labels": labels, "outcome": outcome}


def finish_rm(rows: Iterable[Any], settings: RenderSettings) -> Iterable[dict[str, Any]]:
    for (chosen, _), (rejected, _) in rows:
        outcome = KEPT
        if chosen == rejected:
            outcome = "chosen equals rejected"
        elif settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
            outcome = "longer than max_length"
        yield {"chosen_ids": chosen, "rejected_ids": rejected, "outcome": outcome}


def finish_dpo(rows: Iterable[Any], settings: RenderSettings) -> Iterable[dict[str, Any]]:
    for (chosen, [(chosen_start, _)]), (rejected, [(rejected_start, _)]) in rows:
        prompt = min(chosen_start, rejected_start)
        while chosen[:prompt] != rejected[:prompt]:
            prompt -= 1
        outcome = KEPT
        if settings.max_length is not None and max(len(chosen), len(rejected)) > settings.max_length:
            chosen, rejected, outcome = chosen[: settings.max_length], rejected[: settings.max_length], CUT
        if min(len(chosen), len(rejected)) <= prompt:
            outcome = "the prompt fills max_length" if outcome == CUT else "empty answer"
        elif chosen == rejected:
            outcome = "chosen equals rejected" + (" within max_length" if outcome == CUT else "")
        yield {
            "prompt_ids": chosen[:prompt],
            "chosen_ids": chosen[prompt:],
            "rejected_ids": rejected[prompt:],
            "outcome": outcome,
        }


FINISH = {"sft": finish_sft, "rm": finish_rm, "dpo": finish_dpo}


def token_features(settings: RenderSettings) -> Features:
    """Return the columns of [`process_batch`]."""
    extra = {"margin": Value("float32"), "subset": Value("string")}
    return Features(
        {name: List(Value("int32")) for name in TOKEN_COLUMNS[settings.task]}
        | {"outcome": Value("string")}
        | {name: feature for name, feature in extra.items() if settings.columns.get(name)}
    )


def process_batch(batch: Mapping[str, list[Any]], settings: RenderSettings) -> dict[str, list[Any]]:
    """Columns of raw rows to columns of tokens, an outcome for each row, none left out (a dropped row is empty)."""
    renderer = Renderer(settings)
    count = len(next(iter(batch.values())))
    rows = [{name: values[i] for name, values in batch.items()} for i in range(count)]
    rendered: list[Any] = []
    for row in rows:
        try:
            rendered.append([renderer.sft(row)] if settings.task == "sft" else renderer.pair(row))
        except Dropped as reason:
            rendered.append(str(reason))
    tokens = iter(
        tokenize([text for texts in rendered if isinstance(texts, list) for text in texts], settings.tokenizer)
    )
    kept = [[next(tokens) for _ in texts] for texts in rendered if isinstance(texts, list)]
    finished = iter(FINISH[settings.task]((row[0] for row in kept) if settings.task == "sft" else kept, settings))
    empty = {name: [] for name in TOKEN_COLUMNS[settings.task]}
    result = [next(finished) if isinstance(texts, list) else {**empty, "outcome": texts} for texts in rendered]
    for row, out in zip(rows, result, strict=True):
        if settings.columns.get("margin"):
            out["margin"] = read_margin(row[settings.columns["margin"]], out)
        if settings.columns.get("subset"):
            out["subset"] = str(row[settings.columns["subset"]])
    return {name: [out[name] for out in result] for name in result[0]}


def read_margin(value: Any, out: dict[str, Any]) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        out["outcome"] = "margin is not a number"
        return 0.0
