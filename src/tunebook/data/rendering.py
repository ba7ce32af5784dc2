"""A row becomes text, with the parts of it that are trained, and the text is held against the row."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .audit import OTHERS_TRAINED, SECOND_BOS, SECOND_END, audit, audit_whole, overlap, squash
from .layouts import Layout, fill_template, template_columns
from .pairs import EQUAL, read_alike, split_text, split_turns
from .templates import ChatTemplate, Extras, Located, Span
from .tokenizer import adds_bos, end_of_turn_ids
from .turns import (
    Dropped,
    MessageMapping,
    Turn,
    Users,
    join_opening,
    looks_like_turns,
    read_history,
    read_tools,
    read_turns,
    text_turn,
)

# Raise it when rows become different tokens or labels; the cache of tokens depends on it
FORMAT_VERSION = 2

UNCERTAIN = "it is uncertain where an answer begins or ends in what the chat template writes"

Spans = list[Span]


def read_field(row: Mapping[str, Any], column: str, types: tuple[type, ...]) -> Users:
    """Return the value of a column; drop the row if it is missing or not of one of the types."""
    value = row[column]
    if value is None:
        raise Dropped(f"missing {column}")
    if not isinstance(value, types):
        known = " or ".join(kind.__name__ for kind in types if kind is not dict)
        raise Dropped(f"{column} is {type(value).__name__}, not {known}")
    return value


@dataclass(frozen=True)
class RenderSettings:
    """How rows become text and tokens: all that the token cache depends on, besides the rows."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    layout: Layout
    message_mapping: MessageMapping = field(default_factory=MessageMapping)
    system_prompt: str | None = None
    apply_chat_template: bool | None = None
    assistant_only_loss: bool = False
    last_turn_only_loss: bool = False
    completion_only_loss: bool | None = None
    pretraining: bool = False
    splits: bool = False  # packing cuts longer rows into pieces

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
    flaw: str | None = None  # what of the row is not trained as it stands there


class Renderer:
    """Turns rows into texts, or raises [`Dropped`] for a row that cannot be trained on."""

    def __init__(self, settings: RenderSettings):
        self.settings = settings
        self.templates: dict[str, ChatTemplate] = {}
        tokenizer = settings.tokenizer
        self.marked_template: str | None = None  # with {% generation %} marks
        if settings.assistant_only_loss and tokenizer.chat_template is not None:
            if has_generation_markers(tokenizer.chat_template):
                self.marked_template = tokenizer.get_chat_template()
            else:
                with suppress(Exception):  # TRL has none of this template, or cannot render it
                    self.marked_template = get_training_chat_template(tokenizer)
        self.ends = tuple(tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, None)))
        self.bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""  # that the tokenizer puts before a text

    def template(self, extras: Extras) -> ChatTemplate:
        """Return the chat template for a row."""
        tokenizer = self.settings.tokenizer
        source = self.marked_template or tokenizer.get_chat_template(tools=extras.tools)
        if source not in self.templates:
            self.templates[source] = ChatTemplate(tokenizer, source)
        return self.templates[source]

    # ---- Layouts ----

    def render(self, row: Mapping[str, Any]) -> list[Rendered]:
        """Return the text of an SFT row, or the two texts of a preference pair."""
        return [self.sft(row)] if self.settings.task == "sft" else self.pair(row)

    def sft(self, row: Mapping[str, Any]) -> Rendered:
        """Return the text of an SFT row."""
        columns = self.settings.layout.columns
        if "text" in columns:
            text = read_field(row, columns["text"], (str,))
            if not text:
                raise Dropped("empty text")
            return self.plain("", text)
        if "messages" in columns:
            turns = self.read_turns(read_field(row, columns["messages"], (list, str)))
            return self.conversation(turns, row)
        return self.prompted(self.read_prompt(row), self.read_answer(row, "completion"), row)

    def pair(self, row: Mapping[str, Any]) -> list[Rendered]:
        """Return the texts of chosen and rejected, each with the prompt and trained from where the prompt ends."""
        settings, layout = self.settings, self.settings.layout
        chosen, rejected = self.read_answer(row, "chosen"), self.read_answer(row, "rejected")
        prompt = self.read_prompt(row) if "prompt" in layout.columns or layout.prompt_template else None
        has_prompts = layout.has_prompts
        if isinstance(chosen, str) and isinstance(rejected, str):
            if chosen == rejected:
                raise Dropped(EQUAL)
            if prompt is None and has_prompts:
                prompt, chosen, rejected = split_text(chosen, rejected, settings.tokenizer)
        else:
            prompt, chosen, rejected = split_turns(
                settings.task, prompt, *read_alike(chosen, rejected), has_prompts=has_prompts
            )
        texts = [self.prompted(prompt or "", answer, row) for answer in (chosen, rejected)]
        if settings.task == "dpo":
            answers = [(text.spans or [(0, len(text.text))])[0] for text in texts]
            one, other = (text.text[:start] for text, (start, _) in zip(texts, answers, strict=True))
            if one != other:
                raise Dropped("the chat template writes the prompt of chosen and of rejected differently")
            if any(end < len(text.text) for text, (_, end) in zip(texts, answers, strict=True)):
                raise Dropped("the chat template writes other turns behind the answer")
        return texts

    def read_turns(self, value: Users) -> list[Turn]:
        return read_turns(value, self.settings.message_mapping)

    def read_prompt(self, row: Mapping[str, Any]) -> str | list[Turn]:
        """Return a row's prompt, made by the prompt template if there is one."""
        layout, template = self.settings.layout, self.settings.layout.prompt_template
        prompt = None
        if "prompt" in layout.columns:
            prompt = read_field(row, layout.columns["prompt"], (str, list, dict))
            if not isinstance(prompt, str) or looks_like_turns(prompt):
                return self.read_turns(prompt)
        if template is None:
            return prompt or ""
        values = {}
        for name, may_lack in template_columns(template):
            value = prompt if not name else row[name]
            if value is None and not may_lack:
                raise Dropped(f"missing {name}")
            values[name] = "" if value is None else str(value)
        return fill_template(template, values)

    def read_answer(self, row: Mapping[str, Any], role: str) -> str | list[Turn]:
        """Return an answer, text or turns."""
        answer = read_field(row, self.settings.layout.columns[role], (str, list, dict))
        if isinstance(answer, str) and not looks_like_turns(answer):
            if not answer.strip():
                raise Dropped("empty answer")
            return answer
        if not answer:
            raise Dropped("empty answer")
        turns = self.read_turns(answer)
        if not any(turn.content.strip() or len(turn.message) > 2 for turn in turns if turn.role == "assistant"):
            raise Dropped("empty answer" if turns[-1].role == "assistant" else "no assistant turn")
        return turns

    def question(self, prompt: Users) -> str:
        """Return a prompt, text or turns, with the beginning of an answer; without the answer that it may end with.

        A text passes through the prompt template, and with `apply_chat_template` as a user's turn through the chat
        template.

        Raises:
            Dropped: when it cannot be read.
        """
        template = self.settings.layout.prompt_template
        if isinstance(prompt, str) and not looks_like_turns(prompt):
            text = prompt if template is None else fill_template(template, {"": prompt})
            if not self.settings.apply_chat_template:
                return text.removeprefix(self.bos)
            turns = [text_turn("user", text)]
        else:
            turns = self.read_turns(prompt)
        turns = self.add_system(turns[:-1] if turns[-1].role == "assistant" else turns, {})
        chat = self.template(Extras())
        text, _ = chat.render(chat.shape_messages(turns), Extras(), generation=True)
        return self.single_bos(Rendered(text)).text

    def prompted(self, prompt: str | list[Turn], answer: str | list[Turn], row: Mapping[str, Any]) -> Rendered:
        """Return prompt + answer, trained on what follows the prompt."""
        everything = self.settings.task == "rm" or self.settings.completion_only_loss is False
        templated = self.is_templated(prompt, answer)
        if isinstance(prompt, str) and isinstance(answer, str) and not templated:
            rendered = self.plain(prompt, answer)
            return replace(rendered, spans=None) if everything else rendered
        before = ([text_turn("user", prompt)] if prompt else []) if isinstance(prompt, str) else prompt
        history = self.settings.layout.columns.get("history")
        before = self.add_system([*(read_history(row[history]) if history else []), *before], row)
        answers = [text_turn("assistant", answer)] if isinstance(answer, str) else answer
        turns = join_opening(before, answers)
        return self.turns(turns, row, first=None if everything else len(turns) - len(answers))

    def conversation(self, turns: list[Turn], row: Mapping[str, Any]) -> Rendered:
        """Return a whole conversation, trained throughout, on the assistant's turns or on the last turn."""
        self.is_templated(turns)
        turns = self.add_system(turns, row)
        if not self.settings.last_turn_only_loss:
            return self.turns(turns, row)
        if turns[-1].role != "assistant":
            raise Dropped("the last turn is not the assistant's")
        return self.turns(turns, row, first=len(turns) - 1)

    def is_templated(self, *parts: str | list[Turn]) -> bool:
        """Return whether a chat template renders these parts, texts or lists of turns."""
        apply = self.settings.apply_chat_template
        has_turns = any(isinstance(part, list) for part in parts)
        if has_turns and apply is False:
            raise Dropped("messages need a chat template, but apply_chat_template is false")
        return has_turns or bool(apply) or (self.settings.layout.of_turns and apply is not False)

    def add_system(self, turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
        """Return the turns with the row's or the recipe's system prompt, unless they have their own."""
        column = self.settings.layout.columns.get("system")
        system = (row[column] if column else None) or self.settings.system_prompt
        if not system or (turns and turns[0].role in ("system", "developer")):
            return turns
        if not isinstance(system, str):
            raise Dropped(f"{column} is {type(system).__name__}, not str")
        return [text_turn("system", system), *turns]

    # ---- Texts ----

    def plain(self, prompt: str, answer: str) -> Rendered:
        """Return a text without a template, which ends with EOS but for pre-training."""
        text, flaw, eos = prompt + answer, None, self.settings.tokenizer.eos_token
        start = len(prompt)
        if self.bos and text.startswith(self.bos):
            text, start, flaw = text.removeprefix(self.bos), max(0, start - len(self.bos)), SECOND_BOS
        if not self.settings.pretraining:
            text, removed = self.single_end(text)
            flaw = SECOND_END if removed else flaw
            if not text.rstrip().endswith(self.ends):
                text += eos
        return Rendered(text, [(start, len(text))] if self.settings.layout.name != "text" else None, flaw=flaw)

    def single_end(self, text: str) -> tuple[str, bool]:
        """Return a text without the second of two end tokens at its end, and whether there was one."""
        core, removed = text.rstrip(), False
        while core.endswith(self.ends):
            before = self.without_end(core)
            if not before.rstrip().endswith(self.ends):
                break
            text, core, removed = before, before.rstrip(), True
        return text, removed

    def without_end(self, text: str) -> str:
        """Return a text without the longest end token that it ends with."""
        return text[: -max(len(end) for end in self.ends if text.endswith(end))]

    def turns(self, turns: list[Turn], row: Mapping[str, Any], first: int | None = None) -> Rendered:
        """Return turns as the chat template writes them, and what of them is trained.

        Args:
            first: the first turn of the answer; None for a conversation that is trained throughout or by turns.
        """
        tools = self.settings.layout.columns.get("tools", "tools")
        kwargs = row.get("chat_template_kwargs") or {}
        extras = Extras(read_tools(row.get(tools)), {name: v for name, v in kwargs.items() if v is not None})
        template, (turns, flaw) = self.template(extras), self.without_ends(turns)
        text, marks = template.render(template.shape_messages(turns), extras)
        by_turns = self.settings.assistant_only_loss and (self.settings.task == "sft")
        from_turn = first or 0
        trained = [
            i >= from_turn and turn.trained is not False and (turn.role == "assistant" or not by_turns)
            for i, turn in enumerate(turns)
        ]
        if by_turns and any(turn.trained and turn.role != "assistant" for turn in turns):
            raise Dropped("a turn of another than the assistant says that it is trained: unset `assistant_only_loss`")
        if not any(is_trained and turn.role == "assistant" for is_trained, turn in zip(trained, turns, strict=True)):
            raise Dropped("no assistant turn" if by_turns or first is not None else "no turn is trained")
        whole = first is None and not by_turns and all(trained)
        located = None if whole else template.locate(turns, extras, text)
        if whole:
            spans = None
        elif template.is_marked and by_turns and marks:
            spans = self.marked_spans(marks, located, turns, trained)
        else:
            spans = self.find_spans(located, turns, trained, from_turn, by_turns, text)
        if spans is None:
            flaw = audit_whole(turns, text, template) or flaw
        else:
            flaw = audit(spans, located, turns, trained, text, template) or flaw
        if not by_turns and first is not None and any(turn.role != "assistant" for turn in turns[first:]):
            flaw = flaw or OTHERS_TRAINED
        return self.single_bos(Rendered(text, spans, True, flaw))

    def without_ends(self, turns: list[Turn]) -> tuple[list[Turn], str | None]:
        """Return the turns without an end token at the end of an answer, which the template writes, and the flaw."""
        kept, flaw = [], None
        for turn in turns:
            if turn.role == "assistant" and turn.content.rstrip().endswith(self.ends):
                core = turn.content.rstrip()
                while core.endswith(self.ends):
                    core = self.without_end(core).rstrip()
                turn, flaw = Turn(turn.message | {"content": core}, turn.trained, turn.opening), SECOND_END
            kept.append(turn)
        return kept, flaw

    def marked_spans(
        self, marks: Spans, located: Located | None, turns: Sequence[Turn], trained: Sequence[bool]
    ) -> Spans:
        """Return the spans that a template marks, without those of turns that are not trained."""
        untrained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and not trained[i]]
        if not untrained:
            return marks
        if located is None:
            raise Dropped(UNCERTAIN)
        places = [place for i in untrained for _, places in located.contents[i] for place in places]
        return [span for span in marks if not any(overlap(span, place) for place in places)]

    def find_spans(
        self,
        located: Located | None,
        turns: Sequence[Turn],
        trained: Sequence[bool],
        first: int,
        by_turns: bool,
        text: str,
    ) -> Spans:
        """Return the spans of the trained turns, each with its end; or all from the first on but the others."""
        if located is None:
            raise Dropped(UNCERTAIN)
        chosen = [i for i in range(first, len(turns)) if trained[i] is by_turns]
        start = 0 if by_turns or not first else find_start(located, turns[first], first, text)
        found = [(find_start(located, turns[i], i, text), located.bounds(i)[1]) for i in chosen]
        spans = [(begin, end) for begin, end in found if begin is not None and end is not None]
        if start is None or len(spans) < len(found):
            raise Dropped(UNCERTAIN)
        if not by_turns:
            end = located.bounds(len(turns) - 1)[1]
            edges = [start, *(edge for span in spans for edge in span), len(text) if end is None else end]
            spans = list(zip(edges[::2], edges[1::2], strict=True))
        return [span for span in spans if span[0] < span[1]]

    def single_bos(self, rendered: Rendered) -> Rendered:
        """Return a text that begins with BOS at most once."""
        bos = self.settings.tokenizer.bos_token
        while bos and rendered.text.startswith(bos * 2):
            spans = rendered.spans and [(max(0, a - len(bos)), b - len(bos)) for a, b in rendered.spans]
            rendered = Rendered(rendered.text[len(bos) :], spans, True, rendered.flaw or SECOND_BOS)
        return rendered


def find_start(located: Located, turn: Turn, number: int, text: str) -> int | None:
    """Return where the answer of a turn begins in the text; None where that is uncertain."""
    start = located.bounds(number)[0]
    found = next(((slot, places) for slot, places in located.contents[number] if places), None)
    if found is None:
        return start
    slot, [(begin, end), *_] = found
    if turn.opening:
        if begin is None:
            return None
        stripped = 0 if text[begin].isspace() else len(turn.content) - len(turn.content.lstrip())
        return begin + max(0, len(turn.opening) - stripped)
    if turn.role != "assistant" or start is None:
        return begin
    if begin is not None:
        return min(start, begin)
    # The template rewrites the content. What it opens an answer with may be the beginning of this one
    missing = len(squash(slot.text)) - len(squash(text[start:end]))
    if missing > 0 and squash(slot.text).endswith(squash(text[start:end])):
        earlier = start
        while missing and earlier:
            earlier -= 1
            missing -= not text[earlier].isspace()
        if squash(text[earlier:end]) == squash(slot.text):
            return earlier
    return start
