"""The tokenizer with its template, EOS and pad token settled, and the model loaded to fit it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from .activation_checkpointing import accept_selective
from .recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>' + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

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


def check_model(name: str, revision: str, trust_remote_code: bool) -> None:
    """Fail now, and not after the data was tokenized, where there is no such model.

    Raises:
        RecipeError: when its config.json cannot be found or read.
    """
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"`model_name_or_path` {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    distinct_pad: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's chat template and EOS token, and a pad token.

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
    """[`load_tokenizer`] with the recipe's keys."""
    script_args, training_args, model_args = recipe.args
    return load_tokenizer(
        model_args.model_name_or_path,
        model_args.model_revision,
        training_args.trust_remote_code,
        script_args.chat_template,
        training_args.chat_template_path,
        training_args.eos_token,
        distinct_pad=recipe.task == "rm",
    )


def set_pad_token(tokenizer: PreTrainedTokenizerBase, distinct: bool) -> None:
    spare = [token for token in SPARE_TOKENS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
    if not spare and not distinct:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    logger.info("Pad token: %s", tokenizer.pad_token)


def set_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without chat template ChatML and its two tokens; <|im_end|> ends a turn and becomes EOS."""
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    logger.warning(
        "The tokenizer has no chat template: ChatML is used, with EOS <|im_end|> and %d new tokens. Set chat_template "
        "or chat_template_path for another.",
        added,
    )


def load_model(
    architecture: type,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """The recipe's model (or another by name and revision), loaded so that its embeddings, EOS and pad ids fit the
    tokenizer. A `peft_config` is told to train the embeddings of new tokens, if there are any.

    Raises:
        RecipeError: when it cannot be loaded.
    """
    _, training_args, model_args = recipe.args
    name = name or model_args.model_name_or_path
    kwargs = {
        "revision": revision or model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        # As TRL: accelerate places the model of a distributed run
        **({"device_map": None} if training_args.world_size > 1 or training_args.deepspeed_plugin else {}),
        **({"num_labels": 1} if architecture is AutoModelForSequenceClassification else {}),
        **(training_args.model_init_kwargs or {}),
    }
    set_seed(training_args.seed)  # a new reward head, and embeddings of new tokens, start at random
    try:
        if architecture is AutoModelForSequenceClassification:
            kwargs["key_mapping"] = head_mapping(name, kwargs["revision"], training_args.trust_remote_code)
        with suppress_seqcls_warning():
            model = create_model_from_path(name, architecture, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # the last: weights of other shapes
        raise RecipeError(f"{name} cannot be loaded: {error}") from error

    embeddings = model.get_input_embeddings()
    resized = len(tokenizer) > embeddings.num_embeddings
    if resized:
        new_ids = list(range(embeddings.num_embeddings, len(tokenizer)))
        model.resize_token_embeddings(len(tokenizer))
        logger.warning("Embeddings resized to %d tokens: %s.", len(tokenizer), tokenizer.convert_ids_to_tokens(new_ids))
    if peft_config is not None and (resized or has_new_tokens(tokenizer, name, kwargs)):
        train_new_tokens(model, peft_config)
    text_config = model.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = end_of_turn_ids(tokenizer, model.generation_config.eos_token_id)
    if model_args.num_layers_unfrozen is not None:
        freeze_layers(model, model_args.num_layers_unfrozen)
    accept_selective(model)
    return model


def head_mapping(name: str, revision: str = "main", trust_remote_code: bool = False) -> dict[str, str] | None:
    """For `from_pretrained`: where a reward model saved its head under another name (`value_head_prefix`)."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    prefix = config.to_dict().get("value_head_prefix", "score")
    return None if prefix == "score" else {f"^{re.escape(prefix)}\\.": "score."}


def load_reward_model(name: str) -> PreTrainedModel:
    """A reward model as [`load_model`] trains and `fit` saves it, whatever the name of its head."""
    return AutoModelForSequenceClassification.from_pretrained(name, key_mapping=head_mapping(name))


def rename_head(folder: Path, prefix: str) -> None:
    """Save the head of the reward model in `folder` as `prefix` instead of `score`, and say so in its config. Models
    with another name than score are loaded with [`load_reward_model`]."""
    for path in folder.glob("*.safetensors"):
        tensors = {re.sub(r"^score\.", f"{prefix}.", name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace('"score.', f'"{prefix}.'))
    config = AutoConfig.from_pretrained(folder)
    config.value_head_prefix = prefix
    config.save_pretrained(folder)


def has_new_tokens(tokenizer: PreTrainedTokenizerBase, name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether it has tokens, beside padding, that the model's own has not: where embeddings have spare rows."""
    source = {key: kwargs[key] for key in ("revision", "trust_remote_code")}
    known = {*AutoTokenizer.from_pretrained(name, **source).get_vocab(), tokenizer.pad_token}
    return not known.issuperset(tokenizer.get_vocab())


def train_new_tokens(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Train embeddings and head as a whole beside the adapter, or new tokens would keep their random start. PEFT can
    train single rows of an embedding, but TRL's fused head (trl 1.16) cannot read a head that is tied to such rows."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.split(".")[-1] for name, module in model.named_modules() if any(module is m for m in modules)}
    peft_config.modules_to_save = sorted(names | set(peft_config.modules_to_save or []))
    peft_config.ensure_weight_tying = True


def load_reference(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """DPO's reference: another model if the recipe names one, else the model before training; None where that is the
    model with its adapter off, or was computed beforehand (precompute_ref_log_probs)."""
    _, training_args, model_args = recipe.args
    name = training_args.ref_model_name_or_path
    if name is not None:
        return load_model(AutoModelForCausalLM, recipe, tokenizer, name=name, revision=training_args.ref_model_revision)
    if model_args.use_peft or training_args.precompute_ref_log_probs:
        return None
    return load_model(AutoModelForCausalLM, recipe, tokenizer)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, known: int | list[int] | None) -> list[int]:
    """Ids at which generation ends: the tokenizer's EOS first, those that the model already has, and the special token
    with which the chat template ends an assistant turn."""
    ids = [tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or [])]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex("!") + 1 :], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        ids += [token for token in after[:1] if token in added and added[token].special]
    return list(dict.fromkeys(ids))


def freeze_layers(model: PreTrainedModel, num_unfrozen: int) -> None:
    """Train only the top `num_unfrozen` layers, the norm after them and the head. A head that is tied to the input
    embeddings stays frozen with them.

    Raises:
        RecipeError: when the model has fewer layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if num_unfrozen > depth:
        raise RecipeError(f"`num_layers_unfrozen` {num_unfrozen}: the model has {depth} layers.")
    backbone = model.base_model
    layers = next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    model.requires_grad_(False)
    for layer in layers[depth - num_unfrozen :]:
        layer.requires_grad_(True)
    embeddings = set(model.get_input_embeddings().parameters())
    below = embeddings | set(layers.parameters())
    after_layers = {p for m in backbone.children() if "norm" in type(m).__name__.lower() for p in m.parameters()}
    head = {p for name, m in model.named_children() if m is not backbone for p in m.parameters()}
    for parameter in (after_layers | head) - below:
        parameter.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "num_layers_unfrozen %d: %s of %s parameters are trained.",
        num_unfrozen,
        f"{trained:,}",
        f"{model.num_parameters():,}",
    )
