"""A row becomes text: columns, prompt and chat templates, and which parts of the text are trained."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import extract_prompt

from .layouts import Dropped, Messages, read_field, read_messages

# Raise it when rows become different tokens or labels: the key of the token cache depends on it
FORMAT_VERSION = 1

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class RenderSettings:
    """How rows become text and tokens: all that the token cache depends on, besides the rows."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    columns: Mapping[str, str]  # see [`choose_columns`]
    prompt_template: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool | None = None
    assistant_only_loss: bool = False
    last_turn_only_loss: bool = False
    completion_only_loss: bool | None = None
    pretraining: bool = False

    def fingerprint(self, dataset: Dataset) -> str:
        """Return the cache's key for the tokens of a data set."""
        keys = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        tokenizer = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.tokenizer.eos_token)
        return Hasher.hash((dataset._fingerprint, keys, tokenizer, FORMAT_VERSION))


@dataclass
class Rendered:
    """A row's text, and the parts of it that are trained."""

    text: str
    spans: Spans | None = None  # in characters; None: all of it
    templated: bool = False  # by a chat template, which writes the special tokens itself


class Renderer:
    """Turns rows into texts, or raises [`Dropped`] for a row that cannot be trained on."""

    def __init__(self, settings: RenderSettings):
        self.settings = settings
        self.marked_template: str | None = None  # with {% generation %} marks
        if settings.assistant_only_loss and settings.tokenizer.chat_template is not None:
            if has_generation_markers(settings.tokenizer.chat_template):
                self.marked_template = settings.tokenizer.chat_template
            else:
                with suppress(ValueError):  # TRL has none of this template
                    self.marked_template = get_training_chat_template(settings.tokenizer)

    def render(self, row: Mapping[str, Any]) -> list[Rendered]:
        """Return the text of an SFT row, or the two texts of a preference pair."""
        return [self.sft(row)] if self.settings.task == "sft" else self.pair(row)

    def sft(self, row: Mapping[str, Any]) -> Rendered:
        """Return the text of an SFT row."""
        columns = self.settings.columns
        if "messages" in columns:
            return self.conversation(row)
        if "text" in columns:
            text = read_field(row, columns["text"], (str,))
            if not text:
                raise Dropped("empty text")
            return Rendered(text if self.settings.pretraining else self.end(text))
        prompt, completion = read_field(row, columns["prompt"]), read_field(row, columns["completion"])
        [rendered] = self.prompted(prompt, [completion], row)
        if self.settings.completion_only_loss is False:
            rendered.spans = None
        return rendered

    def pair(self, row: Mapping[str, Any]) -> list[Rendered]:
        """Return the texts of chosen and rejected, each with the prompt and trained from where the prompt ends."""
        columns = self.settings.columns
        chosen, rejected = read_field(row, columns["chosen"]), read_field(row, columns["rejected"])
        prompt = read_field(row, columns["prompt"]) if "prompt" in columns else None
        if type(chosen) is not type(rejected):
            raise Dropped("chosen and rejected are of different types")
        if chosen == rejected:
            raise Dropped("chosen equals rejected")
        if isinstance(chosen, list):
            chosen, rejected = read_messages(chosen, "assistant"), read_messages(rejected, "assistant")
            if chosen[0]["role"] != "assistant":  # some data sets repeat the prompt inside both sides
                prompt = None
        if prompt is None:
            split = extract_prompt({"chosen": chosen, "rejected": rejected})
            prompt, chosen, rejected = split["prompt"], split["chosen"], split["rejected"]
        return self.prompted(prompt, [chosen, rejected], row)

    def prompted(self, prompt: Any, answers: Sequence[Any], row: Mapping[str, Any]) -> list[Rendered]:  # noqa: ANN401
        """Return prompt + answer for each answer, trained on what follows the prompt."""
        if any(len(answer) == 0 for answer in answers):
            raise Dropped("empty answer")
        templated = self.is_templated(prompt, *answers)
        if isinstance(prompt, str) and self.settings.prompt_template is not None:
            prompt = self.settings.prompt_template.replace("{}", prompt)
        if templated:
            before = self.add_system(read_messages(prompt, "user")) if prompt else []
            texts = [self.template(before + read_messages(answer, "assistant"), row)[0] for answer in answers]
            start = self.template(before, row, generation=True)[0] if before else ""
        else:
            start = prompt
            texts = [self.end(start + answer) for answer in answers]
        # A template may render the prompt alone differently: the answer starts where the two renderings part
        starts = [len(start if text.startswith(start) else os.path.commonprefix([start, text])) for text in texts]
        return [Rendered(text, [(cut, len(text))], templated) for cut, text in zip(starts, texts, strict=True)]

    def conversation(self, row: Mapping[str, Any]) -> Rendered:
        """Return a whole conversation, trained throughout, on the assistant's turns or on the last turn."""
        messages = self.add_system(read_messages(read_field(row, self.settings.columns["messages"], (list,)), "user"))
        if self.settings.last_turn_only_loss:
            if messages[-1]["role"] != "assistant":
                raise Dropped("the last turn is not the assistant's")
            return self.prompted(messages[:-1], [messages[-1:]], row)[0]
        templated = self.is_templated(messages)
        text, spans = self.template(messages, row, marked=self.marked_template)
        if not self.settings.assistant_only_loss:
            return Rendered(text, None, templated)
        if self.marked_template is None:
            spans = self.turn_by_turn(messages, row, text)
        if not spans:
            raise Dropped("no assistant turn")
        return Rendered(text, spans, templated)

    def turn_by_turn(self, messages: Messages, row: Mapping[str, Any], text: str) -> Spans:
        """Find the assistant's turns in `text` by rendering the conversation up to each of them, and through it.

        Their place is uncertain where the template renders a beginning differently inside the whole conversation.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.template(messages[:i], row, generation=True)[0] if i else ""
                through = self.template(messages[: i + 1], row)[0]
                if not text.startswith(before) or not text.startswith(through):
                    raise Dropped(
                        "assistant turns cannot be told apart: set last_turn_only_loss or add {% generation %} marks"
                    )
                spans.append((len(before), len(through)))
        return spans

    def template(
        self, messages: Messages, row: Mapping[str, Any], generation: bool = False, marked: str | None = None
    ) -> tuple[str, Spans]:
        """Render turns by the tokenizer's template, with the beginning of an answer if `generation`.

        A template with {% generation %} marks may take its place; the spans that it marks are returned, too.
        """
        tokenizer, tools = self.settings.tokenizer, row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        try:
            [text], spans = render_jinja_template(  # type: ignore[str-unpack] # its annotation is wrong
                conversations=[messages],
                tools=tools,
                chat_template=marked or tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=marked is not None,
                add_generation_prompt=generation,
                **{**tokenizer.special_tokens_map, **(row.get("chat_template_kwargs") or {})},
            )
        except (TemplateError, TypeError) as error:
            raise Dropped(f"chat template error: {error}") from error
        return text, [tuple(span) for marks in spans for span in marks]  # type: ignore[misc]

    def is_templated(self, *parts: object) -> bool:
        """Return whether a chat template renders these parts, texts or lists of turns."""
        has_turns = any(isinstance(part, list) for part in parts)
        if has_turns and self.settings.apply_chat_template is False:
            raise Dropped("messages need a chat template, but apply_chat_template is false")
        return has_turns or bool(self.settings.apply_chat_template)

    def add_system(self, messages: Messages) -> Messages:
        """Return the turns with the recipe's system prompt, unless they have their own."""
        if self.settings.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.settings.system_prompt}, *messages]

    def end(self, text: str) -> str:
        """Return a text that ends with EOS."""
        return text.removesuffix(self.settings.tokenizer.eos_token) + self.settings.tokenizer.eos_token
