"""A row becomes text: columns, prompt and chat templates, and which parts of the text are trained."""

import json
import os
from collections.abc import Mapping, Sequence
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

# Of the token cache: a change of what rows become must raise it, or users train on what an older version cached
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RenderSettings:
    """How rows become text and tokens: all that the token cache depends on, besides the rows."""

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
        return Hasher.hash((dataset._fingerprint, keys, tokenizer, FORMAT_VERSION))


@dataclass
class Rendered:
    """A row's text, and the parts of it (in characters) that are trained on; None: all of it."""

    text: str
    spans: list[tuple[int, int]] | None = None
    templated: bool = False


class Renderer:
    """Rows of text or messages to [`Rendered`], by one recipe's keys."""

    def __init__(self, settings: RenderSettings):
        self.settings = settings
        self.training_template = None
        if settings.assistant_only_loss and settings.tokenizer.chat_template is not None:
            self.training_template = training_template(settings.tokenizer)

    def is_templated(self, *parts: Any) -> bool:
        if any(isinstance(part, list) for part in parts):
            if self.settings.apply_chat_template is False:
                raise Dropped("messages need a chat template, but apply_chat_template is false")
            return True
        return bool(self.settings.apply_chat_template)

    def add_system(self, messages: Messages) -> Messages:
        if self.settings.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.settings.system_prompt}, *messages]

    def template(self, messages: Messages, row: Mapping[str, Any], generation: bool = False) -> str:
        tools = row.get("tools")
        try:
            return self.settings.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **(row.get("chat_template_kwargs") or {}),
            )
        except (TemplateError, TypeError) as error:
            raise Dropped(f"the chat template rejects it: {error}") from error

    def prompt_text(self, prompt: str) -> str:
        return prompt if self.settings.prompt_template is None else self.settings.prompt_template.replace("{}", prompt)

    def end(self, text: str) -> str:
        eos = self.settings.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def prompted(self, prompt: Any, answers: Sequence[Any], row: Mapping[str, Any]) -> tuple[list[Rendered], bool]:
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
        return [Rendered(text, [(cut, len(text))], templated) for cut, text in zip(starts, texts, strict=True)]

    def sft(self, row: Mapping[str, Any]) -> Rendered:
        columns = self.settings.columns
        if "text" in columns:
            text = read_field(row, columns["text"], (str,))
            if not text:
                raise Dropped("empty text")
            return Rendered(text if self.settings.pretraining else self.end(text))
        if "messages" in columns:
            messages = self.add_system(read_messages(read_field(row, columns["messages"], (list,)), "user"))
            if not self.settings.last_turn_only_loss:
                if self.settings.apply_chat_template is False:
                    raise Dropped("messages need a chat template, but apply_chat_template is false")
                text, spans = self.assistant_turns(messages, row)
                return Rendered(text, spans if self.settings.assistant_only_loss else None, templated=True)
            prompt, completion = messages[:-1], messages[-1:]
            if completion[0]["role"] != "assistant":
                raise Dropped("the last turn is not the assistant's")
        else:
            prompt = read_field(row, columns["prompt"])
            completion = read_field(row, columns["completion"])
        [text] = self.prompted(prompt, [completion], row)
        if self.settings.completion_only_loss is False and "messages" not in columns:
            text.spans = None
        return text

    def assistant_turns(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation, and where the assistant speaks in it, end of turn included."""
        if not self.settings.assistant_only_loss:
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
                **{**self.settings.tokenizer.special_tokens_map, **(row.get("chat_template_kwargs") or {})},
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

    def pair(self, row: Mapping[str, Any]) -> list[Rendered]:
        """Chosen and rejected, each with its prompt; trained from where the prompt ends."""
        columns = self.settings.columns
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
