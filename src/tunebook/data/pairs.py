"""The two sides of a preference pair: where they part, and that both are answers."""

from collections.abc import Sequence
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from .tokenizer import special_tokens
from .turns import Dropped, Turn, text_turn

NO_PROMPT = "a pair has no prompt: set `prompt_column`, or to none if that is meant"
EQUAL = "chosen equals rejected"


def read_alike(chosen: str | list[Turn], rejected: str | list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Return the sides of a pair as turns: a text is another answer to what the conversation of the other side asks."""
    turns = rejected if isinstance(chosen, str) else chosen
    before = turns[:-1] if isinstance(turns, list) else []
    one, other = (
        [*before, text_turn("assistant", side)] if isinstance(side, str) else side for side in (chosen, rejected)
    )
    return one, other


def count_common(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """Return how many turns two conversations begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a.message != b.message), min(len(one), len(other)))


def split_turns(
    task: str, prompt: str | list[Turn] | None, chosen: list[Turn], rejected: list[Turn], has_prompts: bool
) -> tuple[str | list[Turn], list[Turn], list[Turn]]:
    """Return the prompt of two conversations, and what remains of each.

    Args:
        prompt: the row's; None if the sides hold it.
        has_prompts: False for pairs that are meant to have none.

    Raises:
        Dropped: when a side does not end with an answer, both are the same, or text of others would be trained.
    """
    if any(side[-1].role != "assistant" for side in (chosen, rejected)):
        raise Dropped("a side does not end with an answer of the assistant")
    if not prompt or chosen[0].role != "assistant":  # some data sets repeat the prompt inside both sides
        shared = count_common(chosen, rejected)
        if shared == len(chosen) == len(rejected):
            raise Dropped(EQUAL)
        if shared in (len(chosen), len(rejected)):
            raise Dropped("one side is the beginning of the other")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt and has_prompts and task == "dpo":
            raise Dropped(NO_PROMPT)
    elif [turn.message for turn in chosen] == [turn.message for turn in rejected]:
        raise Dropped(EQUAL)
    if any(turn.trained is False for turn in (*chosen, *rejected)):
        raise Dropped("a side of a pair says that it is not trained")
    if task == "dpo" and any(turn.role != "assistant" for turn in (*chosen, *rejected)):
        raise Dropped("the sides of a pair differ before the last answer, and text of others would be trained")
    return prompt, chosen, rejected


def split_text(chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Return the prompt of two texts, and what remains of each.

    Their common beginning is a prompt up to where it ends with a line, with a special token, or before a space.

    Raises:
        Dropped: when there is none.
    """
    shared = commonprefix([chosen, rejected])
    ends = [shared.rfind(token) + len(token) for token in special_tokens(tokenizer) if token in shared]
    ends.append(shared.rfind("\n") + 1)
    ends += [i for i in range(len(shared) + 1) if chosen[i : i + 1] == rejected[i : i + 1] == " "]
    ends = [end for end in ends if end > 0 and chosen[end:].strip() and rejected[end:].strip()]
    if not ends:
        raise Dropped(NO_PROMPT)
    return shared[: max(ends)], chosen[max(ends) :], rejected[max(ends) :]
