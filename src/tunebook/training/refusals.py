"""What a recipe, the model's config and this machine refuse together, before rows and weights are read."""

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

from ..environment import launched_sharding
from ..errors import RecipeError, user_errors
from ..files import check_output
from ..packing import pack_causal_lm, pack_reward_model
from ..packing.dropout import turn_off_dropout
from ..packing.heads import reward_head
from ..recipe import Recipe
from ..recipe.configs import DPOConfig, SFTConfig
from .adapters import base_of, check_adapter, find_adapter, trained_adapter
from .models import check_depth, check_model, meta_device, new_tokens, settle_balancing_loss, settle_checkpointing

# Arguments of from_pretrained that are neither in its signature nor in a config
LOADING = {
    *(
        "attn_implementation",
        "experts_implementation",
        "dtype",
        "torch_dtype",
        "device_map",
        "max_memory",
        "state_dict",
    ),
    *("offload_folder", "offload_buffers", "quantization_config", "subfolder", "variant", "gguf_file", "key_mapping"),
    *("trust_remote_code", "code_revision", "proxies", "use_kernels", "kernel_config", "allow_all_kernels", "tp_plan"),
    *("tp_size", "device_mesh", "distributed_config", "generation_config", "low_cpu_mem_usage"),
    *("adapter_name", "adapter_kwargs", "tqdm_class", "output_loading_info"),
    *signature(PreTrainedModel.from_pretrained).parameters,
}

NO_BATCH = (
    "`dataloader_drop_last` drops the only batch, which is not full. Set a smaller per_device_train_batch_size, or "
    "remove the key."
)


def refuse_adapter(recipe: Recipe) -> None:
    """Refuse an adapter in the place of a model where it cannot be merged into its base model in memory.

    Raises:
        RecipeError: naming the command that merges it, and the key of an adapter that is trained further.
    """
    args, name = recipe.model, recipe.model.model_name_or_path
    sharding = launched_sharding(recipe.training)
    reasons = {
        "and `use_peft` would put another on it": args.use_peft,
        "and 4 or 8 bits cannot hold it": args.load_in_4bit or args.load_in_8bit,
        f"and {sharding.engine} shards the weights as it loads them": sharding.stage == 3,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None or (adapter := find_adapter(name, args.model_revision)) is None:
        return
    remedy = f"Run tunebook merge {name} NEW_FOLDER, and name that."
    if args.use_peft:
        keys = f"`adapter_name_or_path: {name}` and `model_name_or_path: {base_of(adapter)[0]}`"
        remedy = f"To train it further, set {keys}. Else: {remedy}"
    raise RecipeError(f"`model_name_or_path` {name} is an adapter, {reason}. {remedy}")


def refuse(recipe: Recipe, config: PreTrainedConfig, has_accelerator: bool | None = None) -> None:
    """Refuse what could not be trained or saved.

    Args:
        config: of the model.
        has_accelerator: of the machine that trains. Default: this one.

    Raises:
        RecipeError: naming the key and what to set.
    """
    args = recipe.training
    check_output(Path(args.output_dir), "`output_dir`", folder=True)
    check_packages(recipe)
    refuse_adapter(recipe)
    adapter = trained_adapter(recipe)
    if has_accelerator is None:
        has_accelerator = torch.accelerator.is_available()
    if args.fp16 and not has_accelerator:
        raise RecipeError("`fp16` needs a GPU: on a CPU it would train in float32. Remove the key.")
    if args.activation_offloading and not has_accelerator:
        raise RecipeError("`activation_offloading` moves activations off a GPU, and there is none. Remove the key.")
    if recipe.model.attn_implementation == "flex_attention" and not has_accelerator:
        raise RecipeError("`attn_implementation: flex_attention` has no backward pass on a CPU. Set it to sdpa.")
    if isinstance(args, DPOConfig) and args.ref_model_name_or_path is not None:
        reference = args.ref_model_name_or_path, args.ref_model_revision
        check_model(*reference, args.trust_remote_code, key="ref_model_name_or_path")
    unknown = {name for name in args.model_init_kwargs or {} if not hasattr(config, name)} - LOADING
    if unknown:
        raise RecipeError(f"`model_init_kwargs`: neither the model's config nor its loading has {', '.join(unknown)}.")
    skeleton = build_skeleton(recipe, config)
    settle_checkpointing(recipe, skeleton)
    with user_errors():
        settle_balancing_loss(skeleton, args)
        if recipe.task == "rm":
            reward_head(skeleton)
    if not isinstance(args, SFTConfig) and args.disable_dropout:
        turn_off_dropout(skeleton)
    model: torch.nn.Module = skeleton
    if recipe.model.num_layers_unfrozen is not None:
        check_depth(config, recipe.model.num_layers_unfrozen)
    if isinstance(adapter, LoraConfig):
        is_new = recipe.model.adapter_name_or_path is None
        model = add_adapter(skeleton, adapter, recipe.task) if is_new else check_adapter(recipe, adapter, skeleton)
    if args.optim != "muon":
        try:
            Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type] # an adapter, too
        except (ValueError, ImportError, RuntimeError, TypeError) as error:
            raise RecipeError(f"`optim` {OptimizerNames(args.optim).value}: {error}") from error
    if args.packing:
        pack = pack_reward_model if recipe.task == "rm" else pack_causal_lm
        with user_errors():
            pack(model, True, not isinstance(args, SFTConfig) and bool(args.share_prefix))


def refuse_few_rows(recipe: Recipe, rows: float) -> None:
    """Refuse to train on fewer rows than a batch of all processes, where `dataloader_drop_last` leaves none."""
    args = recipe.training
    batch = args.per_device_train_batch_size * args.data_parallel_size
    if args.dataloader_drop_last and not args.packing and rows < batch:
        raise RecipeError(NO_BATCH)


def refuse_new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens for which an adapter that is trained further has no embeddings."""
    name = recipe.model.adapter_name_or_path
    if name is not None and (new := new_tokens(tokenizer, recipe)):
        raise RecipeError(
            f"`adapter_name_or_path` {name} was trained without the tokens {', '.join(new)}. Remove what adds them "
            f"(`new_tokens`, a chat template), or run tunebook merge {name} NEW_FOLDER and train a new adapter on that."
        )


def check_packages(recipe: Recipe) -> None:
    """Refuse keys that need a package which is not installed."""
    args, model_args = recipe.training, recipe.model
    for key, wanted, package, is_available in (
        ("use_liger_kernel", args.use_liger_kernel, "liger-kernel", is_liger_kernel_available),
        ("load_in_4bit", model_args.load_in_4bit, "bitsandbytes", is_bitsandbytes_available),
        ("load_in_8bit", model_args.load_in_8bit, "bitsandbytes", is_bitsandbytes_available),
    ):
        if wanted and not is_available():
            raise RecipeError(f"`{key}` needs {package}, which is not installed. Run: pip install {package}")
    missing = {*args.report_to} - {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing:
        raise RecipeError(f"`report_to`: {', '.join(sorted(missing))} is not installed. Install it, or remove it.")


def build_skeleton(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that a recipe trains on the meta device, where it has names and shapes and no weights."""
    architecture = AutoModelForSequenceClassification if recipe.task == "rm" else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if recipe.task == "rm":
        config.num_labels = 1
    args, attention = recipe.training, recipe.model.attn_implementation
    try:
        with meta_device():
            return architecture.from_config(
                config, trust_remote_code=args.trust_remote_code, attn_implementation=attention
            )
    except (ValueError, ImportError) as error:
        key = "`model_name_or_path`" if attention is None else f"`attn_implementation` {attention}"
        raise RecipeError(f"{key}: {str(error).splitlines()[0]}") from error


def add_adapter(model: PreTrainedModel, config: LoraConfig, task: str) -> torch.nn.Module:
    """Return the skeleton with its adapter.

    Raises:
        RecipeError: for names that the model does not have, and a head that cannot have an adapter.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())
    is_list = not isinstance(config.target_modules, str)  # all-linear
    targets = list(config.target_modules or ()) if is_list else []
    find_names("lora_target_modules", targets, list(modules))
    find_names("lora_modules_to_save", config.modules_to_save or (), list(modules))
    find_names("lora_target_parameters", config.target_parameters or (), list(parameters))
    heads = [name for name, module in modules.items() if module is model.get_output_embeddings()]
    if task != "rm" and (found := [target for target in targets if any(is_named(head, target) for head in heads)]):
        raise RecipeError(
            f"`lora_target_modules`: {found[0]} cannot have an adapter, since the loss reads its weights. Remove it, "
            f"or train it as a whole: `lora_modules_to_save: [{found[0]}]`."
        )
    try:
        return get_peft_model(model, copy.deepcopy(config))
    except ValueError as error:
        raise RecipeError(f"`lora_target_modules`: {str(error).splitlines()[0]}") from error


def find_names(key: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a name that no part of the model has, with the names of its parts."""
    missing = [name for name in wanted if not any(is_named(other, name) for other in names)]
    if missing:
        last = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)})
        raise RecipeError(f"`{key}`: the model has no {', '.join(missing)}. It has {', '.join(last)}.")


def is_named(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")
