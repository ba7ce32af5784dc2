"""The tokenizer of a run: the only place that touches its chat template, EOS and pad token."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..errors import RecipeError, foreign
from ..files import read_text
from ..recipe import Recipe

logger = logging.getLogger(__name__)

CHATML = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")

# Models reserve these for padding, or do not use them
SPARE_TOKENS = "<pad> [PAD] <|pad|> <|endoftext|> <|finetune_right_pad_id|> <unk> <|reserved_special_token_0|>".split()


def load_recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with the recipe's chat template, new tokens and EOS token, and a pad token.

    A tokenizer without EOS token takes that of the model's config, else the one that ends a turn in its template.

    Raises:
        RecipeError: when the tokenizer, the template or the EOS token does not exist, or a new token cannot be added.
    """
    args = recipe.training
    name, revision = tokenizer_source(recipe)
    with foreign("The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        if args.chat_template_path is not None:
            copy_template(args.chat_template_path, tokenizer)
    if not tokenizer.is_fast:
        raise RecipeError(f"The tokenizer of {name} has no fast version (tokenizer.json), which the loss masks need.")
    if recipe.script.chat_template is not None:
        tokenizer.chat_template = recipe.script.chat_template
    add_tokens(tokenizer, recipe.model.new_tokens)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise RecipeError(
                f"`eos_token` {args.eos_token!r} is not in the vocabulary of {name}. Add it to `new_tokens`."
            )
        tokenizer.eos_token = args.eos_token
    if tokenizer.eos_token is None:
        model, source = recipe.model.model_name_or_path, {"revision": recipe.model.model_revision}
        config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **source)
        find_eos_token(tokenizer, config.get_text_config().eos_token_id)
    set_pad_token(tokenizer, distinct=recipe.task == "rm")
    if any(added := added_ids(tokenizer)):
        logger.info("The tokenizer puts %r before a text and %r after it.", *map(tokenizer.decode, added))
    return tokenizer


def tokenizer_source(recipe: Recipe) -> tuple[str, str]:
    """Return name and revision of what has the recipe's tokenizer: the adapter that is trained further, with the tokens
    and the template that it was trained with, if it has one; else the model."""
    args = recipe.model
    if args.adapter_name_or_path is not None:
        adapter = args.adapter_name_or_path, args.adapter_revision
        if get_tokenizer_config(adapter[0], revision=adapter[1]):
            return adapter
    return args.model_name_or_path, args.model_revision


def copy_template(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the template from a .jinja file, or with its tokens and EOS from a tokenizer (folder or Hub id)."""
    if path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = read_text(Path(path))
        return
    source = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in source.added_tokens_decoder.values() if token.content not in known])
    tokenizer.eos_token = source.eos_token or tokenizer.eos_token


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Make each text a token of its own, and say which are one already.

    Raises:
        RecipeError: for an empty text, or one by which the vocabulary calls another token.
    """
    known = tokenizer.get_vocab()
    for text in dict.fromkeys(texts):
        if not text:
            raise RecipeError("`new_tokens` has an empty text. Remove it.")
        if text in known and str(tokenizer.decode([known[text]])).strip() != text.strip():
            raise RecipeError(f"`new_tokens` {text!r}: the vocabulary calls another token so. Choose a different text.")
        if text in known:
            logger.warning("`new_tokens` %r is in the vocabulary already, with the id %d.", text, known[text])
    # Not normalized, or a tokenizer that puts a space before each text would find the token there only
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts if text not in known])


def find_eos_token(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None) -> None:
    """Give a tokenizer without EOS token what ends a turn of its template, else a special token that the model ends
    with (`known`), if there is any."""
    starts = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}  # a config's default may be one
    ids = [token for token in as_ids(known) if is_special(tokenizer, token) and token not in starts]
    if ids := end_of_template(tokenizer) + ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
        message = "The tokenizer has no EOS token, so %s is used. Set `eos_token` to use a different one."
        logger.warning(message, tokenizer.eos_token)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    added = tokenizer.added_tokens_decoder
    return token in added and added[token].special


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts before a text and after it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many BOS tokens the tokenizer itself puts before a text: 0 or 1."""
    return int(tokenizer.bos_token_id in added_ids(tokenizer)[0])


def set_pad_token(tokenizer: PreTrainedTokenizerBase, distinct: bool) -> None:
    """Give a tokenizer without pad token one of its spare tokens, else EOS.

    Args:
        distinct: make sure that the pad token is not EOS, with a new token if need be. Reward models need it:
            transformers finds the end of a row by its pad tokens, and would read the reward one token before EOS.
    """
    if tokenizer.pad_token is not None and not (distinct and tokenizer.pad_token == tokenizer.eos_token):
        return
    spare = [token for token in SPARE_TOKENS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
    if not spare and not distinct and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    logger.info("Pad token: %s", tokenizer.pad_token)


def settle_template(tokenizer: PreTrainedTokenizerBase, has_turns: bool, needs_eos: bool = True) -> None:
    """Give ChatML, its two tokens and <|im_end|> as EOS to a tokenizer without chat template, if a row has turns.

    Args:
        needs_eos: false for `pretraining`, which ends no text.

    Raises:
        RecipeError: when the tokenizer then has no EOS token, and needs one.
    """
    if tokenizer.chat_template is None and has_turns:
        chatml = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        added = tokenizer.add_special_tokens(chatml, replace_extra_special_tokens=False)  # type: ignore[arg-type]
        tokenizer.chat_template = CHATML
        tokenizer.eos_token = "<|im_end|>"
        message = "The tokenizer has no chat template, so ChatML is used, with EOS <|im_end|> and %d new tokens. "
        logger.warning(message + "Set `chat_template` or `chat_template_path` to use a different one.", added)
    if needs_eos and tokenizer.eos_token is None:
        special = ", ".join(special_tokens(tokenizer))
        raise RecipeError(
            "The tokenizer has no EOS token, so no answer would end. Set `eos_token` to one of its tokens"
            f" ({special or 'it has no special ones'})."
        )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None) -> list[int]:
    """Return the ids that end an answer: EOS, those that the model has (`known`), the chat template's end of a turn."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(eos + as_ids(known) + end_of_template(tokenizer)))


def as_ids(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else ids or []


def end_of_template(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token with which the chat template ends a turn of the assistant, in a list that is empty if
    there is none."""
    if tokenizer.chat_template is None:
        return []
    answer = "\N{BLACK CHESS QUEEN}"  # of which no template has one of its own
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program of its own, and can raise anything; the rows' report will say what
        return []
    after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"] if answer in text else []
    return [token for token in after if is_special(tokenizer, token)][:1]
