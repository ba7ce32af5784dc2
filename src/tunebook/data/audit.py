"""The text of a row is held against the row: what is trained of it, and what is not."""

from collections.abc import Sequence

from .templates import ChatTemplate, Located, Span
from .turns import Dropped, Turn

# What is wrong with a row that is trained nevertheless
LOST_ANSWER = "the chat template leaves out part of an answer"
UNTRAINED = "part of an answer is outside what the template marks as trained"
OPEN_ANSWER = "no trained end token closes an answer"
SECOND_END = "a second end token is removed"
SECOND_BOS = "a second BOS is removed"
LOST_CONTEXT = "the chat template leaves out part of a turn of the "
OTHERS_TRAINED = "a completion has turns of others, which are trained"

REMEDIES = {
    LOST_ANSWER: "Set `chat_template` or `chat_template_path` to a template that writes it.",
    UNTRAINED: "Set `chat_template` to one whose {% generation %} marks enclose whole answers.",
    OPEN_ANSWER: "Set `chat_template` to one that ends an answer with a special token, inside its {% generation %} "
    "marks if it has them.",
    OTHERS_TRAINED: "Set `assistant_only_loss: true` to train the assistant's turns only.",
    SECOND_END: "Take it out of the rows.",
    SECOND_BOS: "Take it out of the rows.",
}


def remedy(flaw: str) -> str:
    """Return what to do about a flaw of rows."""
    return REMEDIES.get(flaw, REMEDIES[LOST_ANSWER])


def squash(text: str) -> str:
    """Return a text without white space, which templates strip and add."""
    return "".join(text.split())


def overlap(one: Span, other: tuple[int | None, int]) -> bool:
    start = other[1] - 1 if other[0] is None else other[0]
    return one[0] < other[1] and start < one[1]


def audit(
    spans: Sequence[Span],
    located: Located | None,
    turns: Sequence[Turn],
    trained: Sequence[bool],
    text: str,
    template: ChatTemplate,
) -> str | None:
    """Return what of the answers is not trained as the row has it, the worst of it.

    Raises:
        Dropped: when text of a turn that is not to be trained would be.
    """
    if located is None:
        learned = squash("".join(text[start:end] for start, end in spans))
        answers = [turn.content for turn, is_trained in zip(turns, trained, strict=True) if is_trained]
        return None if all(squash(answer) in learned for answer in answers) else LOST_ANSWER
    flaws = []
    for i, turn in enumerate(turns):
        ends = []
        for slot, places in located.contents[i]:
            if not trained[i] and any(overlap(span, place) for span in spans for place in places):
                raise Dropped(f"text of the {turn.role} would be trained that must not be")
            if not places:
                if trained[i] or turn.role != "assistant":
                    flaws.append(LOST_ANSWER if turn.role == "assistant" else LOST_CONTEXT + turn.role)
            elif trained[i]:
                start, end = places[-1]
                around = next((span for span in spans if span[0] < end <= span[1]), None)
                if around is None or (start is not None and start < around[0] and not turn.opening):
                    flaws.append(UNTRAINED)
                elif start is None and squash(slot.text) not in squash(text[slice(*around)]):
                    flaws.append(LOST_ANSWER)
                ends += [(end, around[1])] if around else []
        if ends and turn.role == "assistant" and not template.special.search(text, *max(ends)):
            flaws.append(OPEN_ANSWER)
    order = [LOST_ANSWER, UNTRAINED, OPEN_ANSWER]
    return min(flaws, key=lambda flaw: order.index(flaw) if flaw in order else len(order), default=None)


def audit_whole(turns: Sequence[Turn], text: str, template: ChatTemplate) -> str | None:
    """Return what of a conversation is not in its text, which is trained throughout."""
    for turn in turns:
        texts = [turn.content]
        if len(turn.message) > 2:
            texts += [turn.message.get(name, "") for name in ("reasoning_content", "reasoning", "thinking")]
            texts += [call["function"]["name"] for call in turn.message.get("tool_calls", [])]
        if any(part.strip() not in text and squash(part) not in squash(text) for part in texts):
            return LOST_ANSWER if turn.role == "assistant" else LOST_CONTEXT + turn.role
    return OPEN_ANSWER if template.closing is not None and not template.special.search(template.closing) else None
