"""The tokenizer of a run: the only place that touches its chat template, EOS and pad token."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..recipe import Recipe

logger = logging.getLogger(__name__)

CHATML = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")

# Models reserve these for padding, or do not use them
SPARE_TOKENS = "<pad> [PAD] <|pad|> <|endoftext|> <|finetune_right_pad_id|> <unk> <|reserved_special_token_0|>".split()


def load_recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with the recipe's chat template and EOS token, and a pad token.

    Raises:
        RecipeError: when the tokenizer, the template or the EOS token does not exist.
    """
    name, revision, args = recipe.model.model_name_or_path, recipe.model.model_revision, recipe.training
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        if args.chat_template_path is not None:
            copy_template(args.chat_template_path, tokenizer)
    except (OSError, ValueError) as error:
        raise RecipeError(f"The tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise RecipeError(f"The tokenizer of {name} has no fast version (tokenizer.json), which the loss masks need.")
    if recipe.script.chat_template is not None:
        tokenizer.chat_template = recipe.script.chat_template
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise RecipeError(f"`eos_token` {args.eos_token!r} is not in the vocabulary of {name}.")
        tokenizer.eos_token = args.eos_token
    set_pad_token(tokenizer, distinct=recipe.task == "rm")
    return tokenizer


def copy_template(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the template from a .jinja file, or with its tokens and EOS from a tokenizer (folder or Hub id)."""
    if path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    source = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in source.added_tokens_decoder.values() if token.content not in known])
    tokenizer.eos_token = source.eos_token


def set_pad_token(tokenizer: PreTrainedTokenizerBase, distinct: bool) -> None:
    """Give a tokenizer without pad token one of its spare tokens, else EOS.

    Args:
        distinct: make sure that the pad token is not EOS, with a new token if need be. Reward models need it:
            transformers finds the end of a row by its pad tokens, and would read the reward one token before EOS.
    """
    if tokenizer.pad_token is not None and not (distinct and tokenizer.pad_token == tokenizer.eos_token):
        return
    spare = [token for token in SPARE_TOKENS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
    if not spare and not distinct:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    logger.info("Pad token: %s", tokenizer.pad_token)


def settle_template(tokenizer: PreTrainedTokenizerBase, has_turns: bool) -> None:
    """Give ChatML, its two tokens and <|im_end|> as EOS to a tokenizer without chat template, if a row has turns."""
    if tokenizer.chat_template is not None or not has_turns:
        return
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    message = "The tokenizer has no chat template, so ChatML is used, with EOS <|im_end|> and %d new tokens. "
    logger.warning(message + "Set `chat_template` or `chat_template_path` to use a different one.", added)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None) -> list[int]:
    """Return the ids that end an answer: EOS, those that the model has (`known`), the chat template's end of a turn."""
    ids = [tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or [])]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex("!") + 1 :], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        ids += [token for token in after[:1] if token in added and added[token].special]
    return list(dict.fromkeys(ids))
