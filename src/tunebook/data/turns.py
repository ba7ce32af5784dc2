"""A row's values as turns: what each layout says, in one form, or the reason why it cannot be read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import brief

# Their names for roles, in lower case
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# What says whether a turn is trained -> the value that says that it is
FLAGS = {"weight": True, "train": True, "loss": True, "trainable": True, "masked": False}
UNREADABLE = ("train_detail", "training_detail")  # they train parts of a turn
Messages = list[dict[str, Any]]
Users = Any  # a value of a row, which can be anything


class Dropped(Exception):
    """A row that cannot be trained on: the reason, which many rows may share, and what this row shows of it."""

    def __init__(self, reason: str, example: str = ""):
        super().__init__(reason)
        self.reason, self.example = reason, example

    def __str__(self) -> str:
        return f"{self.reason}: {brief(self.example)}" if self.example else self.reason


@dataclass(frozen=True)
class MessageMapping:
    """The names that a data set has for the fields and roles of a message."""

    role: str | None = None
    content: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)  # theirs -> ours

    @property
    def is_set(self) -> bool:
        return bool(self.role or self.content or self.roles)


@dataclass
class Turn:
    """A turn as a template takes it."""

    message: dict[str, Any]
    trained: bool | None = None  # what the row itself says; None: nothing
    opening: str = ""  # the beginning of its content that belongs to the prompt

    @property
    def role(self) -> str:
        return self.message["role"]

    @property
    def content(self) -> str:
        return self.message["content"]


def parse_json(value: str, what: str) -> Users:
    try:
        return json.loads(value)
    except ValueError as error:
        raise Dropped(f"{what} is text that is not JSON", value[:80]) from error


def without_nulls(value: Users) -> Users:
    """Return a value without the nulls that Arrow adds to the mappings of a column, at every depth."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def looks_like_turns(value: Users) -> bool:
    """Return whether a text is the JSON of a conversation, as a cell of a CSV file holds it."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    try:
        turns = json.loads(value)
    except ValueError:
        return False
    return all(isinstance(turn, dict) and ({"role", "from"} & turn.keys()) for turn in turns)


def read_turns(value: Users, mapping: MessageMapping) -> list[Turn]:
    """Read a conversation: messages or ShareGPT's turns, as a list, as one message, or as the JSON text of either.

    Raises:
        Dropped: when it is empty, or a turn holds what is not known.
    """
    if isinstance(value, str):
        value = parse_json(value, "a conversation")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Dropped(f"a conversation is {type(value).__name__}, not a list of turns")
    turns = [read_turn(turn, mapping) for turn in value]
    if not turns:
        raise Dropped("empty conversation")
    return turns


def read_turn(raw: Users, mapping: MessageMapping) -> Turn:
    """Read a turn; see [`read_turns`]."""
    if not mapping.is_set and type(raw) is dict and raw.keys() == {"role", "content"}:  # most turns: five times faster
        role, content = raw["role"], raw["content"]
        if type(role) is str and ROLES.get(role) == role and type(content) is str:
            return Turn(raw)
    if not isinstance(raw, dict):
        raise Dropped(f"a turn is {type(raw).__name__}, not a mapping with role and content", str(raw)[:80])
    fields = {name: value for name, value in raw.items() if value is not None}
    shares_gpt = "from" in fields and "role" not in fields
    role_name = mapping.role or ("from" if shares_gpt else "role")
    content_name = mapping.content or ("value" if shares_gpt else "content")
    role = fields.pop(role_name, None)
    if role is None:
        raise Dropped("a turn has no role")
    ours = mapping.roles.get(role) if isinstance(role, str) else None
    ours = ours or (ROLES.get(role.lower()) if isinstance(role, str) else None)
    if ours is None:
        raise Dropped("a turn has an unknown role: map it in `message_mapping`", f"role {role!r}"[:80])
    content = fields.pop(content_name, None)
    for name in UNREADABLE:
        if fields.get(name):
            raise Dropped(f"`{name}` trains parts of a turn, which is not supported")
    trained = read_flags(fields)
    message: dict[str, Any] = {"role": "assistant" if ours == "call" else ours}
    if ours == "call":
        message |= {"content": "", "tool_calls": read_calls(content)}
    else:
        calls = fields.pop("tool_calls", None) or fields.pop("function_call", None)
        thought = any(name in fields for name in ("reasoning_content", "reasoning", "thinking"))
        if content is None and not calls and not thought:
            raise Dropped(f"a turn has no {content_name}")
        message["content"] = "" if content is None else read_content(content)
        if calls:
            message["tool_calls"] = read_calls(calls)
    return Turn(message | {name: without_nulls(value) for name, value in fields.items()}, trained)


def read_flags(fields: dict[str, Any]) -> bool | None:
    """Take out what says whether a turn is trained, and return it; None if nothing does.

    Raises:
        Dropped: when it is neither yes nor no, or two disagree.
    """
    said = set()
    for name, yes in FLAGS.items():
        if name in fields:
            value = fields.pop(name)
            if value not in (0, 1):
                raise Dropped(f"a turn's `{name}` is neither 0 nor 1", str(value)[:80])
            said.add(bool(value) is yes)
    if len(said) > 1:
        raise Dropped("a turn says both that it is trained and that it is not")
    return said.pop() if said else None


def read_content(content: Users) -> str:
    """Return the text of a message's content, a text or a list of parts.

    Raises:
        Dropped: when a part is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Dropped(f"a content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else without_nulls(part)
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Dropped(f"a content has a part of type {str(kind)[:20]}, and the model reads text only")
        texts.append(part["text"])
    return "".join(texts)


def read_calls(value: Users) -> Messages:
    """Return tool calls in OpenAI's form, with arguments as a mapping.

    Raises:
        Dropped: when a call has no name, or arguments are not a mapping.
    """
    value = parse_json(value, "a tool call") if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = parse_json(call, "a tool call") if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Dropped("a tool call has no name", str(call)[:80])
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "a tool call's arguments") if arguments.strip() else {}
        else:  # in JSON text a null is the row's own
            arguments = without_nulls(arguments or {})
        if not isinstance(arguments, dict):
            raise Dropped("a tool call's arguments are not a mapping", str(arguments)[:80])
        ids = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({"type": "function", **ids, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def read_tools(value: Users) -> Messages | None:
    """Return the tools of a row in OpenAI's form, which templates read; None if it has none.

    Raises:
        Dropped: when they are not mappings, or text that is not JSON.
    """
    from_text = isinstance(value, str)
    if from_text:
        value = parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    tools = value if isinstance(value, list) else [value]
    # Some data sets store a list of texts
    clean = (lambda tool: tool) if from_text else without_nulls
    tools = [parse_json(tool, "a tool") if isinstance(tool, str) else clean(tool) for tool in tools]
    if any(not isinstance(tool, dict) for tool in tools):
        raise Dropped("a tool is not a mapping", str(value)[:80])
    wrapped = [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]
    return [tool for tool in wrapped if tool] or None


def read_history(value: Users) -> list[Turn]:
    """Read earlier exchanges, pairs of a question and its answer.

    Raises:
        Dropped: when one is not a pair of texts.
    """
    value = (parse_json(value, "history") if value.strip() else None) if isinstance(value, str) else value
    turns = []
    for pair in value or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Dropped("history is not a list of pairs of texts", str(pair)[:80])
        turns += [text_turn("user", pair[0]), text_turn("assistant", pair[1])]
    return turns


def text_turn(role: str, content: str) -> Turn:
    return Turn({"role": role, "content": content})


def join_opening(before: Sequence[Turn], answer: Sequence[Turn]) -> list[Turn]:
    """Return the turns of a prompt and its answer; what of an answer ends the prompt already is one turn with it."""
    if not before or not answer or before[-1].role != "assistant" or answer[0].role != "assistant":
        return [*before, *answer]
    opening, rest = before[-1], answer[0]
    message = opening.message | rest.message | {"content": opening.content + rest.content}
    return [*before[:-1], Turn(message, rest.trained, opening.content), *answer[1:]]
