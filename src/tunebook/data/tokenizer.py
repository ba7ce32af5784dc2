"""The tokenizer of a run: the only place that touches its chat template, EOS and pad token."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..recipe import Recipe

logger = logging.getLogger(__name__)

CHATML = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")

# Tokens that models reserve for padding, or for nothing
SPARE_TOKENS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<unk>",
    "<|reserved_special_token_0|>",
)


def load_tokenizer(
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    distinct_pad: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with the recipe's chat template and EOS token, and a pad token.

    Args:
        chat_template: Jinja template.
        chat_template_path: a .jinja file, or a tokenizer (folder or Hub id) to take the template, its tokens and its
            EOS token from.
        distinct_pad: make sure that the pad token is not the EOS token. Reward models need it: transformers finds the
            end of a row by its pad tokens, and would read the reward one token before EOS.

    Raises:
        RecipeError: when the tokenizer, the template or the EOS token does not exist.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        if chat_template_path is not None and chat_template_path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        elif chat_template_path is not None:
            source = AutoTokenizer.from_pretrained(chat_template_path)
            tokenizer.chat_template = source.get_chat_template()
            tokenizer.add_tokens(
                [t for t in source.added_tokens_decoder.values() if t.content not in tokenizer.get_vocab()]
            )
            tokenizer.eos_token = source.eos_token
    except (OSError, ValueError) as error:
        raise RecipeError(f"The tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise RecipeError(f"The tokenizer of {name} has no fast version (tokenizer.json), which the loss masks need.")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise RecipeError(f"`eos_token` {eos_token!r} is not in the vocabulary of {name}.")
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token is None or (distinct_pad and tokenizer.pad_token == tokenizer.eos_token):
        set_pad_token(tokenizer, distinct_pad)
    return tokenizer


def load_recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Call [`load_tokenizer`] with the recipe's keys."""
    return load_tokenizer(
        recipe.model.model_name_or_path,
        recipe.model.model_revision,
        recipe.training.trust_remote_code,
        recipe.script.chat_template,
        recipe.training.chat_template_path,
        recipe.training.eos_token,
        distinct_pad=recipe.task == "rm",
    )


def set_pad_token(tokenizer: PreTrainedTokenizerBase, distinct: bool) -> None:
    spare = [token for token in SPARE_TOKENS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
    if not spare and not distinct:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    logger.info("Pad token: %s", tokenizer.pad_token)


def settle_template(tokenizer: PreTrainedTokenizerBase, has_turns: bool) -> None:
    """Give a tokenizer without chat template ChatML where a row has turns, with its two tokens; <|im_end|> ends a turn
    and becomes EOS."""
    if tokenizer.chat_template is not None or not has_turns:
        return
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    logger.warning(
        "The tokenizer has no chat template: ChatML is used, with EOS <|im_end|> and %d new tokens. Set chat_template "
        "or chat_template_path for another.",
        added,
    )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None) -> list[int]:
    """Return the ids at which generation ends: the tokenizer's EOS first, then those that the model already has, and
    the special token with which the chat template ends an assistant turn."""
    ids = [tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or [])]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex("!") + 1 :], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        ids += [token for token in after[:1] if token in added and added[token].special]
    return list(dict.fromkeys(ids))
