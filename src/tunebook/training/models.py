"""The model, loaded to fit the tokenizer, and what of it is trained."""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import deepspeed as hf_deepspeed
from trl import get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from ..data.tokenizer import end_of_turn_ids, tokenizer_source
from ..environment import uses_fsdp
from ..errors import RecipeError, brief, foreign
from ..packing.heads import find_backbone, has_routers
from ..recipe import Recipe
from ..recipe.configs import DPOConfig
from ..recipe.schema import Training
from .activation_checkpointing import accept_selective
from .adapters import base_of, find_adapter, load_adapter, trained_adapter

logger = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
POSITIONS = re.compile(r"wpe|embed_positions|\w*position\w*_embed\w*|pos_emb\w*")  # names of tables of positions


def check_model(name: str, revision: str, trust_remote_code: bool, key: str = "model_name_or_path") -> PreTrainedConfig:
    """Return the config of a model, or of an adapter's base; fail before the data is tokenized where there is none.

    Args:
        key: of the recipe, for the message.

    Raises:
        RecipeError: when its config.json cannot be found or read.
    """
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise RecipeError(f"`{key}` {brief(name)} is not a folder. Set it to one, or to a Hub id.")
    with foreign(f"`{key}` {brief(name)}"):
        if adapter := find_adapter(name, revision):
            name, revision = base_of(adapter)
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


@contextmanager
def meta_device() -> Iterator[None]:
    """Build models on the meta device inside, under ZeRO-3 too, which would share out weights that do not exist."""
    # PATCH(transformers<5.25): from_config asks a global whether ZeRO-3 is on, and has no argument for it. Waits for
    # transformers/modeling_utils.py:1435. Delete when from_config leaves models on the meta device alone.
    config = hf_deepspeed._hf_deepspeed_config_weak_ref and hf_deepspeed._hf_deepspeed_config_weak_ref()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def put_adapter(base: PreTrainedModel, name: str, revision: str | None = None) -> PeftModel:
    """Return the base model with its adapter, and as many embeddings as the adapter's tokenizer has tokens."""
    fit_tokenizer(base, AutoTokenizer.from_pretrained(name, revision=revision))
    return PeftModel.from_pretrained(base, name, revision=revision)


def settle_checkpointing(recipe: Recipe, model: PreTrainedModel) -> None:
    """Leave activation checkpointing off where it is only the default and the model has none.

    Raises:
        RecipeError: when the recipe asks for it.
    """
    args, name = recipe.training, type(model).__name__
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        if recipe.given.get("activation_checkpointing"):
            raise RecipeError(f"`activation_checkpointing`: {name} has none. Set it to false.")
        args.activation_checkpointing = args.gradient_checkpointing = False
        logger.info("Activation checkpointing is off: %s has none.", name)


def settle_balancing_loss(model: PreTrainedModel, args: Training) -> None:
    """Have TRL ask for the load-balancing loss of the models that have router logits, and of no others.

    Raises:
        ValueError: when the recipe asks for the loss, and the model has none.
    """
    config = model.config.get_text_config()
    values = config.to_dict()
    if has_routers(model):
        config.output_router_logits = values.get("output_router_logits", False)
    elif args.router_aux_loss_coef:
        raise ValueError(
            f"`router_aux_loss_coef`: {type(model).__name__} is not a mixture of experts with router logits. Remove "
            "the key."
        )
    elif args.router_aux_loss_coef is None and values.get("router_aux_loss_coef"):
        args.router_aux_loss_coef = 0.0
        text = "No load-balancing loss: the config asks for one (router_aux_loss_coef %s), and %s has no router logits."
        logger.info(text, values["router_aux_loss_coef"], type(model).__name__)


def check_positions(model: PreTrainedModel, datasets: Sequence[Dataset], max_length: int | None) -> None:
    """Refuse rows that are longer than the model's table of learned positions.

    Raises:
        ValueError: with the length of the longest row, and what to set.
    """
    for name, table in find_backbone(model).named_modules():
        if isinstance(table, torch.nn.Embedding) and POSITIONS.fullmatch(name.rpartition(".")[2]):
            rows = min(
                table.num_embeddings, model.config.to_dict().get("max_position_embeddings", table.num_embeddings)
            )
            rows -= 0 if table.padding_idx is None else table.padding_idx + 1
            if max_length is None or max_length > rows:
                longest = min(max(map(longest_row, datasets)), max_length or sys.maxsize)
                if longest > rows:
                    raise ValueError(
                        f"`max_length`: {type(model).__name__} has learned {rows} positions, and the longest row has "
                        f"{longest} tokens. Set max_length: {rows}."
                    )


def longest_row(dataset: Dataset) -> int:
    """Return the tokens of the longest tokenized row, or of the longer side of a pair."""
    columns = {"input_ids", "prompt_ids", "chosen_ids", "rejected_ids"}.intersection(dataset.column_names)
    longest = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        lengths = {name: pc.list_value_length(table[name]).to_numpy() for name in columns}
        prompt = lengths.pop("prompt_ids", 0)
        longest = max(longest, *(int((prompt + side).max()) for side in lengths.values()))
    return longest


def load_model(
    architecture: type, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, weights: Path | None = None
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """Return the model to train, fitted to the tokenizer, and the config of its adapter, if the recipe asks for a new
    one. One that is trained further is on the model already.

    Args:
        weights: checkpoint of the run that the model's weights are read from, but not those of an adapter.

    Raises:
        RecipeError: when it cannot be loaded, or an adapter does not fit it.
    """
    args, peft_config = recipe.model, trained_adapter(recipe)
    source = args.model_name_or_path, args.model_revision
    if weights is not None and not args.use_peft:
        source = str(weights), "main"
    model = read_model(architecture, recipe, *source)
    settle_balancing_loss(model, recipe.training)
    resized = fit_tokenizer(model, tokenizer)
    if peft_config is not None and args.adapter_name_or_path is not None:
        return load_adapter(model, recipe, peft_config), None
    if isinstance(peft_config, LoraConfig) and (resized or new_tokens(tokenizer, recipe)):
        train_new_tokens(model, peft_config)
    if args.num_layers_unfrozen is not None:
        freeze_layers(model, args.num_layers_unfrozen)
    return model, peft_config


def load_reference(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Return DPO's reference: another model if the recipe names one, else the model before training; None where that is
    the model with its adapter off, or as it was (`adapter_name_or_path`), or its log-probs are computed beforehand
    (`precompute_ref_log_probs`) by the model that will train. Under FSDP that is not sharded yet, and TRL would load a
    reference without the recipe's keys."""
    args, name, revision = recipe.training, recipe.model.model_name_or_path, recipe.model.model_revision
    assert isinstance(args, DPOConfig)
    if args.ref_model_name_or_path is not None:
        name, revision = args.ref_model_name_or_path, args.ref_model_revision or revision
    elif recipe.model.use_peft or (args.precompute_ref_log_probs and not uses_fsdp()):
        return None
    model = read_model(AutoModelForCausalLM, recipe, name, revision)
    fit_tokenizer(model, tokenizer)
    return model


def read_model(architecture: type, recipe: Recipe, name: str, revision: str) -> PreTrainedModel:
    """Load a model as the recipe says: its dtype, attention, quantization and `model_init_kwargs`."""
    args, rewards = recipe.training, architecture is AutoModelForSequenceClassification
    kwargs = {
        "revision": revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        "quantization_config": get_quantization_config(recipe.model),
        # Like TRL: accelerate places the model of a distributed run
        **({"device_map": None} if args.world_size > 1 or args.deepspeed_plugin else {}),
        **({"num_labels": 1} if rewards else {}),
        **(args.model_init_kwargs or {}),  # type: ignore[dict-item] # transformers has parsed text
    }
    set_seed(args.seed)  # a new reward head, and embeddings of new tokens, start at random
    with foreign(name), suppress_seqcls_warning():
        adapter, base = find_adapter(name, revision), name
        if adapter is not None:
            base, kwargs["revision"] = base_of(adapter)
        if rewards:
            kwargs["key_mapping"] = head_mapping(base, kwargs["revision"], args.trust_remote_code)
        model = create_model_from_path(base, architecture, **kwargs)  # type: ignore[arg-type]
        if adapter is not None:
            model = put_adapter(model, name, revision).merge_and_unload()
            logger.info("%s is an adapter: %s with it merged is trained.", name, base)
    accept_selective(model)
    if recipe.model.load_in_4bit and not torch.accelerator.is_available():
        keep_layout(model)
    return model


def keep_layout(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as training needs them, also through an evaluation."""
    # PATCH(bitsandbytes<0.51): on a CPU with bf16 instructions, a layer that is evaluated lays its weights out for a
    # kernel that has no backward pass, and training goes through that kernel, too. Waits for
    # bitsandbytes/nn/modules.py:612. Delete when a layer that trains restores its weights.
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the model a row of embeddings for each token, and the tokenizer's EOS and pad ids; return whether there were
    too few rows."""
    rows = cast(int, model.get_input_embeddings().num_embeddings)
    resized = len(tokenizer) > rows
    if resized:
        model.resize_token_embeddings(len(tokenizer))
        new = tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer))))
        logger.warning("Embeddings resized to %d tokens: %s.", len(tokenizer), new)
    config = model.config.get_text_config()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = end_of_turn_ids(tokenizer, model.generation_config.eos_token_id)
        repair_generation_config(model)
    return resized


def repair_generation_config(model: PreTrainedModel) -> None:
    """Leave out of the generation config the values of sampling where `do_sample` is false, as in Vicuna and Llama 2:
    transformers would refuse to save them at the end of the run."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError as error:
        if not config.do_sample:
            for name in SAMPLING:
                setattr(config, name, None)
        text = "The model's generation_config.json could not be saved as it is, so what does not fit is left out: %s"
        logger.warning(text, " ".join(str(error).split())[:300])


def new_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[str]:
    """Return the tokens, other than padding, that the tokenizer of the model, or of the adapter that is trained
    further, lacks. Spare rows of embeddings can hide them from the check of sizes."""
    name, revision = tokenizer_source(recipe)
    own = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=recipe.training.trust_remote_code)
    return sorted({*tokenizer.get_vocab()} - {*own.get_vocab(), tokenizer.pad_token})


def train_new_tokens(model: PreTrainedModel, peft_config: LoraConfig) -> None:
    """Have PEFT train embeddings and head as a whole besides the adapter, or new tokens would keep their random start.
    It can train single rows of an embedding, but TRL's fused head (trl 1.16) cannot read a head tied to such rows."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.split(".")[-1] for name, module in model.named_modules() if any(module is m for m in modules)}
    peft_config.modules_to_save = sorted(names | set(peft_config.modules_to_save or []))
    peft_config.ensure_weight_tying = True


def check_depth(config: PreTrainedConfig, num_unfrozen: int) -> int:
    """Return the number of a model's layers.

    Raises:
        RecipeError: when fewer than `num_unfrozen`.
    """
    depth = config.get_text_config().num_hidden_layers
    if num_unfrozen > depth:
        raise RecipeError(f"`num_layers_unfrozen` {num_unfrozen}: the model has {depth} layers.")
    return depth


def freeze_layers(model: PreTrainedModel, num_unfrozen: int) -> None:
    """Train only the top `num_unfrozen` layers, the norm after them and the head. A head that is tied to the input
    embeddings stays frozen with them.

    Raises:
        RecipeError: when the model has fewer layers.
    """
    depth, backbone = check_depth(model.config, num_unfrozen), find_backbone(model)
    layers = next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    model.requires_grad_(False)
    layers[depth - num_unfrozen :].requires_grad_(True)
    norms = [module for module in backbone.children() if "norm" in type(module).__name__.lower()]
    heads = [module for module in model.children() if module is not backbone]
    below = {*model.get_input_embeddings().parameters(), *layers.parameters()}
    for parameter in {p for module in norms + heads for p in module.parameters()} - below:
        parameter.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = f"{trained:,} of {model.num_parameters():,}"
    logger.info("num_layers_unfrozen %d trains %s parameters.", num_unfrozen, counts)


def head_mapping(name: str, revision: str = "main", trust_remote_code: bool = False) -> dict[str, str] | None:
    """Return `key_mapping` of `from_pretrained` for a reward model that saved its head under another name."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    prefix = config.to_dict().get("value_head_prefix", "score")
    return None if prefix == "score" else {f"^{re.escape(prefix)}\\.": "score."}


def load_reward_model(name: str) -> PreTrainedModel:
    """Load a reward model as `fit` saved it, whole or an adapter, whatever the name of its head."""
    if adapter := find_adapter(name):
        base, revision = base_of(adapter)
        mapping = head_mapping(base, revision)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, revision=revision, key_mapping=mapping
        )
        return put_adapter(model, name).merge_and_unload()
    return AutoModelForSequenceClassification.from_pretrained(name, key_mapping=head_mapping(name))


def rename_head(folder: Path, prefix: str) -> None:
    """Rename the head of the reward model in `folder` from `score` to `prefix`, in its weights and its config. A model
    whose head is not named score is loaded with [`load_reward_model`]."""
    for path in folder.glob("*.safetensors"):
        tensors = {re.sub(r"^score\.", f"{prefix}.", name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace('"score.', f'"{prefix}.'))
    config = AutoConfig.from_pretrained(folder)
    config.value_head_prefix = prefix
    config.save_pretrained(folder)
