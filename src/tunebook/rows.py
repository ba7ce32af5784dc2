"""A row becomes text, and text becomes tokens and labels: columns, templates, loss masks, cuts.

Every row has an outcome: kept, cut, or the reason why it cannot be trained on.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import extract_prompt

from .recipe import RecipeError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
KEPT, CUT = "kept", "cut"

Messages = list[dict[str, Any]]


class Dropped(Exception):
    """A row that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class Rendering:
    """How rows become text and tokens: everything the token cache depends on, beside the rows."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    columns: Mapping[str, str | None]  # prompt, completion, messages, text, chosen, rejected, margin, subset
    prompt_template: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool | None = None
    assistant_only_loss: bool = False
    last_turn_only_loss: bool = False
    completion_only_loss: bool | None = None
    pretraining: bool = False

    def fingerprint(self, dataset: Dataset) -> str:
        keys = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        tokenizer = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.tokenizer.eos_token)
        return Hasher.hash((dataset._fingerprint, keys, tokenizer, Path(__file__).read_bytes()))

    def features(self) -> Features:
        extra = {"margin": Value("float32"), "subset": Value("string")}
        return Features(
            {name: List(Value("int32")) for name in TOKEN_COLUMNS[self.task]}
            | {"outcome": Value("string")}
            | {name: feature for name, feature in extra.items() if self.columns.get(name)}
        )


def choose_columns(task: str, names: Sequence[str], keys: Mapping[str, str | None]) -> dict[str, str | None]:
    """Role -> column name, from the recipe's keys and, where they are silent, TRL's names.

    Raises:
        RecipeError: when a named column does not exist, none of the known layouts is there, or two are.
    """
    for role, column in keys.items():
        if column is not None and column not in names:
            raise RecipeError(f"`{role}_column`: there is no column {column!r}. Columns: {', '.join(names)}.")

    def find(role: str, *usual: str) -> str | None:
        return keys.get(role) or next((name for name in usual if name in names), None)

    if task != "sft":
        columns = {"chosen": find("chosen", "chosen"), "rejected": find("rejected", "rejected")}
        if None in columns.values():
            raise RecipeError(
                f"A preference row needs chosen and rejected; columns: {', '.join(names)}. Set chosen_column and "
                "rejected_column."
            )
        columns["prompt"] = find("prompt", "prompt")
        if keys.get("subset"):
            columns["subset"] = keys["subset"]
        if "margin" in keys:
            columns["margin"] = find("margin", "margin")
            if columns["margin"] is None:
                raise RecipeError(
                    f"`use_margin` needs a column margin; columns: {', '.join(names)}. Set margin_column."
                )
        return columns

    layouts = {
        "messages": {"messages": find("messages", "messages", "conversations")},
        "prompt and completion": {"prompt": find("prompt", "prompt"), "completion": find("completion", "completion")},
        "text": {"text": find("text", "text")},
    }
    named = {role for role, column in keys.items() if column is not None}
    found = {name: columns for name, columns in layouts.items() if None not in columns.values()}
    if named:
        found = {name: columns for name, columns in found.items() if named <= columns.keys()}
    if len(found) != 1:
        problem = f"fits {' and '.join(found)}" if found else "has none of messages, prompt and completion, text"
        raise RecipeError(
            f"The data set {problem}; columns: {', '.join(names)}. Set messages_column, prompt_column and "
            "completion_column, or text_column."
        )
    return next(iter(found.values()))


def read_messages(value: Any, role: str) -> Messages:
    """A conversation from messages, ShareGPT turns or a plain text said by `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Dropped(f"a turn is {type(turn).__name__}, not a mapping with role and content")
        if "from" in turn:
            turn = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        turn = {name: value for name, value in turn.items() if value is not None}
        if "role" not in turn:
            raise Dropped("a turn has no role")
        messages.append(turn)
    if not messages:
        raise Dropped("empty conversation")
    return messages


def read_field(row: Mapping[str, Any], column: str, types: tuple[type, ...] = (str, list)) -> Any:
    value = row[column]
    if value is None:
        raise Dropped(f"missing {column}")
    if not isinstance(value, types):
        raise Dropped(f"{column} is {type(value).__name__}, not {' or '.join(t.__name__ for t in types)}")
    return value


@dataclass
class Text:
    """A row's text, and the parts of it (in characters) that are trained on; None: all of it."""

    text: str
    spans: list[tuple[int, int]] | None = None
    templated: bool = False


class Renderer:
    """Rows of text or messages to [`Text`], by one recipe's keys."""

    def __init__(self, how: Rendering):
        self.how = how
        self.training_template = None
        if how.assistant_only_loss and how.tokenizer.chat_template is not None:
            self.training_template = training_template(how.tokenizer)

    def is_templated(self, *parts: Any) -> bool:
        if any(isinstance(part, list) for part in parts):
            if self.how.apply_chat_template is False:
                raise Dropped("messages need a chat template, but apply_chat_template is false")
            return True
        return bool(self.how.apply_chat_template)

    def add_system(self, messages: Messages) -> Messages:
        if self.how.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.how.system_prompt}, *messages]

    def template(self, messages: Messages, row: Mapping[str, Any], generation: bool = False) -> str:
        tools = row.get("tools")
        try:
            return self.how.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **(row.get("chat_template_kwargs") or {}),
            )
        except (TemplateError, TypeError) as error:
            raise Dropped(f"the chat template rejects it: {error}") from error

    def prompt_text(self, prompt: str) -> str:
        return prompt if self.how.prompt_template is None else self.how.prompt_template.replace("{}", prompt)

    def end(self, text: str) -> str:
        eos = self.how.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def prompted(self, prompt: Any, answers: Sequence[Any], row: Mapping[str, Any]) -> tuple[list[Text], bool]:
        """Prompt + answer for each answer, trained on what follows the prompt."""
        if any(len(answer) == 0 for answer in answers):
            raise Dropped("empty answer")
        if self.is_templated(prompt, *answers):
            prompt = self.prompt_text(prompt) if isinstance(prompt, str) else prompt
            before = self.add_system(read_messages(prompt, "user")) if prompt else []
            texts = [self.template(before + read_messages(answer, "assistant"), row) for answer in answers]
            start = self.template(before, row, generation=True) if before else ""
        else:
            start = self.prompt_text(prompt)
            texts = [self.end(start + answer) for answer in answers]
        templated = self.is_templated(prompt, *answers)
        # A template may render the prompt alone otherwise than in the conversation: the answer starts where they part
        starts = [len(start if text.startswith(start) else os.path.commonprefix([start, text])) for text in texts]
        return [Text(text, [(cut, len(text))], templated) for cut, text in zip(starts, texts, strict=True)]

    def sft(self, row: Mapping[str, Any]) -> Text:
        columns = self.how.columns
        if "text" in columns:
            text = read_field(row, columns["text"], (str,))
            if not text:
                raise Dropped("empty text")
            return Text(text if self.how.pretraining else self.end(text))
        if "messages" in columns:
            messages = self.add_system(read_messages(read_field(row, columns["messages"], (list,)), "user"))
            if not self.how.last_turn_only_loss:
                if self.how.apply_chat_template is False:
                    raise Dropped("messages need a chat template, but apply_chat_template is false")
                text, spans = self.assistant_turns(messages, row)
                return Text(text, spans if self.how.assistant_only_loss else None, templated=True)
            prompt, completion = messages[:-1], messages[-1:]
            if completion[0]["role"] != "assistant":
                raise Dropped("the last turn is not the assistant's")
        else:
            prompt = read_field(row, columns["prompt"])
            completion = read_field(row, columns["completion"])
        [text] = self.prompted(prompt, [completion], row)
        if self.how.completion_only_loss is False and "messages" not in columns:
            text.spans = None
        return text

    def assistant_turns(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation, and where the assistant speaks in it, end of turn included."""
        if not self.how.assistant_only_loss:
            return self.template(messages, row), []
        if self.training_template is not None:
            texts, spans = self.marked(messages, row)
        else:
            texts, spans = self.turn_by_turn(messages, row)
        if not spans:
            raise Dropped("no assistant turn")
        return texts, spans

    def marked(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """By the template's own {% generation %} marks."""
        tools = row.get("tools")
        try:
            [text], [spans] = render_jinja_template(
                conversations=[messages],
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                chat_template=self.training_template,
                return_assistant_tokens_mask=True,
                **{**self.how.tokenizer.special_tokens_map, **(row.get("chat_template_kwargs") or {})},
            )
        except (TemplateError, TypeError) as error:
            raise Dropped(f"the chat template rejects it: {error}") from error
        return text, [tuple(span) for span in spans]

    def turn_by_turn(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """By rendering the conversation up to each assistant turn, and through it. Refused where the template renders
        the beginning of a conversation otherwise than inside the whole, since then no turn has a certain place."""
        text = self.template(messages, row)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.template(messages[:i], row, generation=True) if i else ""
                through = self.template(messages[: i + 1], row)
                if not text.startswith(before) or not text.startswith(through):
                    raise Dropped(
                        "the chat template renders a turn differently inside a longer conversation, so assistant turns "
                        "cannot be told apart: use last_turn_only_loss, or a template with {% generation %} marks"
                    )
                spans.append((len(before), len(through)))
        return text, spans

    def pair(self, row: Mapping[str, Any]) -> list[Text]:
        """Chosen and rejected, each with its prompt; trained from where the prompt ends."""
        columns = self.how.columns
        chosen, rejected = read_field(row, columns["chosen"]), read_field(row, columns["rejected"])
        prompt = read_field(row, columns["prompt"]) if columns["prompt"] else None
        if type(chosen) is not type(rejected):
            raise Dropped("chosen and rejected are of different kinds")
        if chosen == rejected:
            raise Dropped("chosen equals rejected")
        if isinstance(chosen, list):
            chosen, rejected = read_messages(chosen, "assistant"), read_messages(rejected, "assistant")
            # Some data sets repeat the prompt inside both sides, beside a prompt column of text
            whole = chosen[0]["role"] != "assistant"
            prompt = None if whole else prompt
        if prompt is None:
            split = extract_prompt({"chosen": chosen, "rejected": rejected})
            prompt, chosen, rejected = split["prompt"], split["chosen"], split["rejected"]
        return self.prompted(prompt, [chosen, rejected], row)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template with {% generation %} marks: the tokenizer's own, or TRL's version of it, if there is one."""
    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


# ---- Tokens --------------------------------------------------------------------------------------------------------


def tokenize(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase
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


def finish_sft(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for ids, spans in rows:
        labels = [-100] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        outcome = KEPT
        if how.max_length is not None and len(ids) > how.max_length:
            ids, labels, outcome = ids[: how.max_length], labels[: how.max_length], CUT
        if labels.count(-100) == len(labels):
            outcome = f"nothing to train on{' within max_length' if outcome == CUT else ''}"
        yield {"input_ids": ids, "labels": labels, "outcome": outcome}


def finish_rm(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for (chosen, _), (rejected, _) in rows:
        outcome = KEPT
        if chosen == rejected:
            outcome = "chosen equals rejected"
        elif how.max_length is not None and max(len(chosen), len(rejected)) > how.max_length:
            outcome = "longer than max_length"
        yield {"chosen_ids": chosen, "rejected_ids": rejected, "outcome": outcome}


def finish_dpo(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for (chosen, [(chosen_start, _)]), (rejected, [(rejected_start, _)]) in rows:
        prompt = min(chosen_start, rejected_start)
        while chosen[:prompt] != rejected[:prompt]:
            prompt -= 1
        outcome = KEPT
        if how.max_length is not None and max(len(chosen), len(rejected)) > how.max_length:
            chosen, rejected, outcome = chosen[: how.max_length], rejected[: how.max_length], CUT
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
TOKEN_COLUMNS = {
    "sft": ["input_ids", "labels"],
    "rm": ["chosen_ids", "rejected_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
}


def process_batch(batch: Mapping[str, list[Any]], how: Rendering) -> dict[str, list[Any]]:
    """Columns of raw rows to columns of tokens, an outcome for each row, none left out (a dropped row is empty)."""
    renderer = Renderer(how)
    count = len(next(iter(batch.values())))
    rows = [{name: values[i] for name, values in batch.items()} for i in range(count)]
    rendered: list[Any] = []
    for row in rows:
        try:
            rendered.append([renderer.sft(row)] if how.task == "sft" else renderer.pair(row))
        except Dropped as reason:
            rendered.append(str(reason))
    tokens = iter(tokenize([text for texts in rendered if isinstance(texts, list) for text in texts], how.tokenizer))
    kept = [[next(tokens) for _ in texts] for texts in rendered if isinstance(texts, list)]
    finished = iter(FINISH[how.task]((row[0] for row in kept) if how.task == "sft" else kept, how))
    empty = {name: [] for name in TOKEN_COLUMNS[how.task]}
    result = [next(finished) if isinstance(texts, list) else {**empty, "outcome": texts} for texts in rendered]
    for row, out in zip(rows, result, strict=True):
        if how.columns.get("margin"):
            out["margin"] = read_margin(row[how.columns["margin"]], out)
        if how.columns.get("subset"):
            out["subset"] = str(row[how.columns["subset"]])
    return {name: [out[name] for out in result] for name in result[0]}


def read_margin(value: Any, out: dict[str, Any]) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        out["outcome"] = "margin is not a number"
        return 0.0
