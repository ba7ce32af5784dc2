"""The model, loaded to fit the tokenizer, and what of it is trained."""

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

from ..data.tokenizer import end_of_turn_ids
from ..errors import RecipeError
from ..recipe import Recipe
from .activation_checkpointing import accept_selective

logger = logging.getLogger(__name__)


def check_model(name: str, revision: str, trust_remote_code: bool) -> None:
    """Fail now, and not after the data was tokenized, where there is no such model.

    Raises:
        RecipeError: when its config.json cannot be found or read.
    """
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"`model_name_or_path` {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


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
    training_args, model_args = recipe.training, recipe.model
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
    training_args, model_args = recipe.training, recipe.model
    name = training_args.ref_model_name_or_path
    if name is not None:
        return load_model(AutoModelForCausalLM, recipe, tokenizer, name=name, revision=training_args.ref_model_revision)
    if model_args.use_peft or training_args.precompute_ref_log_probs:
        return None
    return load_model(AutoModelForCausalLM, recipe, tokenizer)


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
