"""A chat template renders turns, and it is found where each turn stands in the text.

A template is a program: no rule says where the answer begins in what it writes. So a conversation is rendered a second
time with marks in the place of its contents. What stands between the marks is the template's own text, and the
rendering of the turns before, with the beginning of an answer, shows where a turn begins in it. The marked text is
the same for all conversations of one shape, and is kept. Where a template treats contents differently from marks, the
conversation itself is rendered with a mark at the end of each content.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from .tokenizer import special_tokens
from .turns import Dropped, Messages, Turn, Users

MARK = re.compile(r"ZqX(\d{5})XqZ", re.IGNORECASE)
LITERAL = {"role", "type", "id", "tool_call_id", "name"}  # templates decide by these
FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking"}
TEXT_ONLY = {"role", "content"}
SHAPES = 10_000  # that are kept at a time

Span = tuple[int, int]


@dataclass(frozen=True)
class Extras:
    """What a row gives a template besides its turns."""

    tools: Messages | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A text of a conversation: a content, a thought, an argument of a call."""

    turn: int
    text: str
    is_argument: bool  # stands in the JSON of a call


@dataclass(frozen=True)
class Marked:
    """A rendering without its marks, and where they stood."""

    text: str
    marks: list[tuple[int, int]]  # slot, position; in the order of the text

    @classmethod
    def read(cls, text: str) -> "Marked":
        parts = MARK.split(text)
        marks, position = [], 0
        for literal, slot in zip(parts[::2], parts[1::2], strict=False):
            position += len(literal)
            marks.append((int(slot), position))
        return cls("".join(parts[::2]), marks)


@dataclass(frozen=True)
class Place:
    """A position in a text: behind a number of marks, in characters of the text without what they stand for."""

    marks: int
    offset: int


class ChatTemplate:
    """A chat template of a tokenizer, its own or one that takes its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str):
        self.tokenizer, self.source, self.is_marked = tokenizer, source, has_generation_markers(source)
        special = {*special_tokens(tokenizer), tokenizer.eos_token} - {None}
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.fields = FIELDS | {name for name in re.findall(r"\w+", source)}
        self.shapes: dict[str, Shape | None] = {}
        self.as_parts, self.json_arguments, self.null_content = False, False, False
        self.opening = ""  # what a template writes at the beginning of an answer, after a question
        self.closing: str | None = None  # what it writes after the last answer; None: that is not known
        self.probe()

    # ---- Rendering ----

    def render(self, messages: Messages, extras: Extras, generation: bool = False) -> tuple[str, list[Span]]:
        """Return the text, and the spans inside {% generation %} marks, in characters.

        Args:
            generation: with the beginning of an answer.

        Raises:
            Dropped: when the template raises anything.
        """
        try:
            [text], spans = render_jinja_template(  # type: ignore[str-unpack] # its annotation is wrong
                conversations=[messages],
                tools=extras.tools,  # type: ignore[arg-type]
                chat_template=self.source,
                return_assistant_tokens_mask=self.is_marked,
                add_generation_prompt=generation,
                **{**self.tokenizer.special_tokens_map, **extras.kwargs},
            )
        except Exception as error:  # a template is a program of its own, and can raise anything
            raise Dropped("the chat template fails", f"{type(error).__name__}: {error}"[:200]) from error
        return text, [(start, end) for marks in spans for start, end in marks]  # type: ignore[misc, str-unpack]

    def shape_messages(self, turns: Iterable[Turn]) -> Messages:
        """Return turns as this template reads them: contents as text or parts, arguments as mappings or JSON text."""
        messages = []
        for turn in turns:
            message = turn.message
            if message.keys() - TEXT_ONLY:
                message = {name: value for name, value in message.items() if name in self.fields}
            if calls := message.get("tool_calls"):
                if self.json_arguments:
                    message["tool_calls"] = [with_json_arguments(call) for call in calls]
                if self.null_content and not message["content"]:
                    message["content"] = None
            if self.as_parts and message["content"] is not None:
                message = message | {"content": [{"type": "text", "text": message["content"]}]}
            messages.append(message)
        return messages

    def probe(self) -> None:
        """Find the forms that the template reads, and what it writes around an answer."""
        user, answer = (Turn({"role": role, "content": mark(i)}) for i, role in enumerate(("user", "assistant")))
        for self.as_parts in (False, True):
            if mark(0) in self.try_render([user]):
                break
        else:
            self.as_parts = False
        call = {"name": "call" + mark(2), "arguments": {"key" + mark(3): mark(4)}}
        calls = Turn(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call00000", "type": "function", "function": call}],
            }
        )
        for self.json_arguments, self.null_content in ((False, False), (False, True), (True, False), (True, True)):
            text = self.try_render([user, calls])
            key = "key" + mark(3)
            if all(mark(i) in text for i in (2, 3, 4)) and f"'{key}'" not in text and f'\\"{key}' not in text:
                break
        else:
            self.json_arguments, self.null_content = False, False
        before, opened = self.try_render([user]), self.try_render([user], generation=True)
        self.opening = opened.removeprefix(commonprefix([before, opened])) if opened != before else ""
        text = self.try_render([user, answer])
        self.closing = text.rpartition(mark(1))[2] if mark(1) in text else None

    def try_render(self, turns: Sequence[Turn], generation: bool = False) -> str:
        try:
            return self.render(self.shape_messages(turns), Extras(), generation)[0]
        except Dropped:  # and rows like it are
            return ""

    # ---- Places ----

    def locate(self, turns: Sequence[Turn], extras: Extras, text: str) -> "Located | None":
        """Find where the contents of turns stand in their rendering; None where that is uncertain."""
        messages = self.shape_messages(turns)
        marked, slots = mark_messages(messages, lambda number, _: mark(number))
        given = extras.tools or extras.kwargs
        key = repr(marked) + (json.dumps([extras.tools, dict(extras.kwargs)], default=str) if given else "")
        if key not in self.shapes:
            if len(self.shapes) >= SHAPES:
                self.shapes.clear()
            try:
                self.shapes[key] = Shape(self, marked, slots, extras)
            except Dropped:  # with marks, though not with contents
                self.shapes[key] = None
        shape = self.shapes[key]
        if shape is not None and (spans := shape.align(slots, text)) is not None:
            return Located(shape, slots, spans)
        marked, slots = mark_messages(messages, mark_end)
        try:
            shape = Shape(self, marked, slots, extras, at_ends=True)
        except Dropped:
            return None
        ends = [position for _, position in shape.full.marks]
        return Located(shape, slots, list(zip(shape.starts, ends, strict=True))) if shape.full.text == text else None


class Shape:
    """What a template writes for conversations of one shape, with marks in the place of their contents.

    Args:
        at_ends: the marks stand behind the contents of one conversation.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Messages,
        slots: Sequence[Slot],
        extras: Extras,
        at_ends: bool = False,
    ):
        self.template, self.messages, self.extras, self.at_ends = template, messages, extras, at_ends
        self.owners = [slot.turn for slot in slots]
        self.full = self.mark(messages)
        self.starts: list[int | None] = [position for _, position in self.full.marks]  # of the contents
        if at_ends:
            cores = [slots[slot].text.rstrip() for slot, _ in self.full.marks]
            self.starts = [
                end - len(core) if self.full.text[:end].endswith(core) else None
                for core, (_, end) in zip(cores, self.full.marks, strict=True)
            ]
        self.known: dict[int, tuple[Place | None, Place | None]] = {}

    def mark(self, messages: Messages, generation: bool = False) -> Marked:
        return Marked.read(self.template.render(messages, self.extras, generation)[0])

    def align(self, slots: Sequence[Slot], text: str) -> list[Span] | None:
        """Return where in `text` stands what each mark stands for; None if the text is another one."""
        ends = [position for _, position in self.full.marks] + [len(self.full.text)]
        spans, position = [], ends[0]
        if not text.startswith(self.full.text[:position]):
            return None
        for (slot, literal), end in zip(self.full.marks, ends[1:], strict=True):
            after = self.full.text[literal:end]
            value = next((v for v in variants(slots[slot]) if text.startswith(v + after, position)), None)
            if value is None:
                return None
            spans.append((position, position + len(value)))
            position += len(value) + len(after)
        return spans if position == len(text) else None

    def bounds(self, turn: int) -> tuple[Place | None, Place | None]:
        """Return where the answer of a turn begins and ends; None where that is uncertain."""
        if turn not in self.known:
            self.known[turn] = self.find_start(turn), self.find_end(turn)
        return self.known[turn]

    def marks_of(self, turn: int) -> list[int]:
        """Return which of the marks of the text stand for what a turn says."""
        return [i for i, (slot, _) in enumerate(self.full.marks) if self.owners[slot] == turn]

    def anchor(self, other: Marked, turns: range) -> tuple[int, str] | None:
        """Return the last mark of another rendering that stands for one of these turns, as which mark of the text it
        is, and what the other writes after it."""
        places = {slot: i for i, (slot, _) in enumerate(self.full.marks)}
        for i, (slot, position) in reversed([*enumerate(other.marks)]):
            if slot in places and self.owners[slot] in turns:
                end = other.marks[i + 1][1] if i + 1 < len(other.marks) else len(other.text)
                return places[slot], other.text[position:end]
        return None

    def find_start(self, turn: int) -> Place | None:
        """Find where the answer begins: after what the template writes between the turn before and an answer."""
        own = self.marks_of(turn)
        first = own[0] if own else len(self.full.marks)
        limit = self.starts[own[0]] if own else len(self.full.text)
        if limit is None:
            limit = self.full.marks[own[0]][1]
        opening, closing, begin = self.template.opening, "", 0
        before, found = self.messages[:turn], None
        try:  # a template may not take a part of a conversation
            if before and (found := self.anchor(self.mark(before, generation=True), range(turn))):
                begin, rest = self.full.marks[found[0]][1], found[1]
                closed = self.anchor(self.mark(before), range(turn))
                closing = closed[1] if closed and closed[0] == found[0] else rest
                opening = rest.removeprefix(closing)
        except Dropped:
            found = None
        region = self.full.text[begin:limit]
        same = len(commonprefix([region, closing + opening]))
        if found and same == len(closing + opening):
            return self.place(begin + same, first)
        for text in (opening, opening.strip(), self.template.opening, self.template.opening.strip()):
            if text.strip() and (at := region.rfind(text)) >= 0:
                return self.place(begin + at + len(text), first)
        if found and same >= len(closing):  # the opening is longer than what this answer begins with
            return self.place(begin + same, first)
        return self.place(limit, first) if own and self.starts[own[0]] is not None else None

    def place(self, offset: int, first: int) -> Place:
        """Return a position before the mark `first`."""
        return Place(sum(position <= offset for _, position in self.full.marks[:first]), offset)

    def find_end(self, turn: int) -> Place | None:
        """Find where the answer ends: behind what the template writes after it, be there another turn or not."""
        own, marks = self.marks_of(turn), self.full.marks
        if turn == len(self.messages) - 1:
            if not own or own[-1] == len(marks) - 1:
                return Place(len(marks), len(self.full.text))
            after, end = marks[own[-1]][1], marks[own[-1] + 1][1]  # another turn stands behind the last
            special = self.template.special.match(self.full.text, after, end)
            return Place(own[-1] + 1, special.end() if special else after)
        try:
            through = self.mark(self.messages[: turn + 1])
        except Dropped:
            return Place(own[-1] + 1, marks[own[-1]][1]) if own else None
        found = self.anchor(through, range(turn, turn + 1) if own else range(turn))
        if found is None:
            return None
        index, closing = found
        begin = marks[index][1]
        region = self.full.text[begin : marks[index + 1][1] if index + 1 < len(marks) else len(self.full.text)]
        if region.startswith(closing):
            return Place(index + 1, begin + len(closing))
        if not own:
            return None
        shared = len(commonprefix([closing, region]))
        whole = [match.end() for match in self.template.special.finditer(region) if match.end() <= shared]
        return Place(index + 1, begin + (whole[-1] if whole else 0))


@dataclass(frozen=True)
class Located:
    """Where the contents of a conversation stand in its text."""

    shape: Shape
    slots: Sequence[Slot]
    spans: Sequence[tuple[int | None, int]]  # of each mark of the shape; a start may be unknown

    def bounds(self, turn: int) -> tuple[int | None, int | None]:
        """Return where the answer of a turn begins and ends in the text; None where that is uncertain."""
        start, end = self.shape.bounds(turn)
        return self.position(start), self.position(end)

    def position(self, place: Place | None) -> int | None:
        if place is None:
            return None
        if self.shape.at_ends:
            return place.offset
        return place.offset + sum(end - (start or 0) for start, end in self.spans[: place.marks])

    @cached_property
    def contents(self) -> dict[int, list[tuple[Slot, list[tuple[int | None, int]]]]]:
        """Turn -> its slots, each with the places where it stands; none for one that is left out."""
        places: list[list[tuple[int | None, int]]] = [[] for _ in self.slots]
        for (number, _), span in zip(self.shape.full.marks, self.spans, strict=True):
            places[number].append(span)
        turns = defaultdict(list)
        for slot, spans in zip(self.slots, places, strict=True):
            turns[slot.turn].append((slot, spans))
        return turns


@cache
def mark(number: int) -> str:
    return f"ZqX{number:05}XqZ"


def mark_end(number: int, value: str) -> str:
    """Put a mark behind a text, before the white space that a template may strip."""
    core = value.rstrip()
    return core + mark(number) + value[len(core) :]


def mark_messages(messages: Messages, put: Callable[[int, str], str]) -> tuple[Messages, list[Slot]]:
    """Return messages with a mark in each text other than white space, and these texts.

    Args:
        put: returns what stands in the place of a text: (its number, the text).
    """
    slots: list[Slot] = []

    def walk(value: Users, turn: int, argument: bool, literal: Set[str] = LITERAL) -> Users:
        if isinstance(value, str) and value.strip():
            slots.append(Slot(turn, value, argument))
            return put(len(slots) - 1, value)
        if isinstance(value, dict):
            return {
                name: inner
                if name in literal
                else walk(inner, turn, argument or name == "tool_calls", set() if name == "arguments" else literal)
                for name, inner in value.items()
            }
        return [walk(inner, turn, argument, literal) for inner in value] if isinstance(value, list) else value

    return [walk(message, turn, False) for turn, message in enumerate(messages)], slots


def variants(slot: Slot) -> Iterable[str]:
    """Yield the forms in which a template may write a text."""
    text = slot.text
    yield text
    if text != (core := text.strip()):
        yield from (core, text.rstrip(), text.lstrip(), text.strip("\n"))
    if slot.is_argument:
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield json.dumps(text)[1:-1]


def with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
