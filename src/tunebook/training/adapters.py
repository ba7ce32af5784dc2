"""Adapters: one in the place of a model, and one that a run trains further (`adapter_name_or_path`)."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import get_peft_config

from ..environment import fsdp_version, launched_sharding, uses_fsdp
from ..errors import RecipeError, foreign
from ..recipe import Recipe
from ..recipe.configs import DPOConfig

logger = logging.getLogger(__name__)

# What an adapter has settled already: our keys, and its config's names for them
SETTLED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}


def find_adapter(name: str, revision: str | None = None) -> PeftConfig | None:
    """Return the config of an adapter, in a folder or on the Hub; None for a whole model."""
    if (Path(name) / "config.json").is_file() or find_adapter_config_file(name, revision=revision) is None:
        return None
    return PeftConfig.from_pretrained(name, revision=revision)


def base_of(adapter: PeftConfig) -> tuple[str, str]:
    """Return name and revision of the model that an adapter was trained on."""
    return str(adapter.base_model_name_or_path), adapter.revision or "main"


def trained_adapter(recipe: Recipe) -> PeftConfig | None:
    """Return the config of the adapter that a recipe trains: a new one's, or that of `adapter_name_or_path`, of which
    the recipe may change the dropout only.

    Raises:
        RecipeError: when the latter is not one of LoRA.
    """
    args = recipe.model
    if args.adapter_name_or_path is None:
        return get_peft_config(args)
    name = f"`adapter_name_or_path` {args.adapter_name_or_path}"
    if Path(args.adapter_name_or_path).is_absolute() and not Path(args.adapter_name_or_path).is_dir():
        raise RecipeError(f"{name} is not a folder. Set it to one, or to a Hub id.")
    with foreign(name):
        config = find_adapter(args.adapter_name_or_path, args.adapter_revision)
    if config is None:
        raise RecipeError(
            f"{name} is not an adapter: it has no adapter_config.json, or is a whole model. Set it to an adapter; a "
            "whole model is `model_name_or_path`."
        )
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise RecipeError(
            f"{name} is an adapter of {plain_value(config.peft_type)}; only those of LoRA are trained further."
        )
    config.inference_mode, config.revision = False, args.model_revision
    if "lora_dropout" in recipe.given:
        config.lora_dropout = args.lora_dropout
    return config


def check_adapter(recipe: Recipe, adapter: LoraConfig, skeleton: PreTrainedModel) -> torch.nn.Module:
    """Return the skeleton of the model with the adapter that the recipe trains further.

    Raises:
        RecipeError: for an adapter of another task or model, keys of LoRA with other values than it has, and what
            cannot be trained.
    """
    args = recipe.model
    name = f"`adapter_name_or_path` {args.adapter_name_or_path}"
    merged = f"Run tunebook merge {args.adapter_name_or_path} NEW_FOLDER, and train that: `model_name_or_path`."
    if recipe.task == "rm" and adapter.task_type != "SEQ_CLS":
        raise RecipeError(f"{name} has no reward head that was trained with it. {merged}")
    if recipe.task != "rm" and adapter.task_type not in ("CAUSAL_LM", None):
        raise RecipeError(f"{name} is one of {plain_value(adapter.task_type)}. Set it to a language model's adapter.")
    given = {key: field for key, field in SETTLED.items() if key in recipe.given}
    wanted = cast(LoraConfig, get_peft_config(args))
    if "lora_target_modules" in given and wanted.target_modules == "all-linear":
        get_peft_model(skeleton, wanted).unload()  # which names the layers in its config
    for key, field in given.items():
        ours, theirs = plain_value(vars(wanted)[field]), plain_value(vars(adapter)[field])
        if ours != theirs:
            raise RecipeError(
                f"`{key}` {recipe.given[key]}: {name} was trained with {theirs}, which cannot change. Remove the key."
            )
    if isinstance(recipe.training, DPOConfig) and uses_fsdp() and fsdp_version() == 1:
        raise RecipeError(
            "`adapter_name_or_path` and DPO need an adapter's matrices, which FSDP1 flattens. Set fsdp_version: 2."
        )
    base = base_of(adapter)[0]
    if base != args.model_name_or_path and Path(base).resolve() != Path(args.model_name_or_path).resolve():
        logger.warning("%s was trained on %s, not on %s.", name.replace("`", ""), base, args.model_name_or_path)
    head = type(skeleton.get_output_embeddings())
    with foreign(name, fault=f"does not fit {args.model_name_or_path}"):
        adapted = get_peft_model(skeleton, copy.deepcopy(adapter))
    if not isinstance(
        skeleton.get_output_embeddings(), head | ModulesToSaveWrapper
    ):  # single tokens of a tied one, too
        raise RecipeError(f"{name} changes the head, whose weights the loss reads. {merged}")
    return adapted


def plain_value(value: object) -> object:
    """Return a value of an adapter's config as a recipe has it."""
    if isinstance(value, set | list | tuple):
        return sorted(value) or None
    return value.value if isinstance(value, Enum) else value


def load_adapter(model: PreTrainedModel, recipe: Recipe, config: PeftConfig) -> PeftModel:
    """Return a model with the adapter that the recipe trains further.

    Raises:
        RecipeError: when the adapter does not fit the model.
    """
    args, name = recipe.model, str(recipe.model.adapter_name_or_path)
    # Like TRL: ZeRO-3 takes parameters of one dtype only
    casts = not launched_sharding(recipe.training).is_zero3 or args.load_in_4bit or args.load_in_8bit
    adapted = get_peft_model(model, config, autocast_adapter_dtype=casts)
    assert isinstance(adapted, PeftModel)
    with foreign(f"`adapter_name_or_path` {name}", fault=f"does not fit {args.model_name_or_path}"):
        read_weights(adapted, name, args.adapter_revision, casts)
    return adapted


def read_weights(model: PeftModel, name: str, revision: str | None = None, casts: bool = False) -> None:
    """Read the weights of the adapter that a model trains, from one in a folder or on the Hub.

    Args:
        casts: weights in half precision become float32.

    Raises:
        ValueError: when the two have not the same weights.
    """
    with gather_params_ctx(trained_weights(model)):
        loaded = model.load_adapter(name, "default", is_trainable=True, revision=revision, autocast_adapter_dtype=casts)
    # PEFT also saves embeddings by names that it does not take back
    if different := [key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if ".lora_" in key]:
        raise ValueError(f"{len(different)} weights are in one of them only: {different[0]}, ...")


def trained_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class StartingWeights:
    """The trained weights of a model as they are now. An adapter that is trained further is its own reference in DPO:
    these weights take the place of the present ones for the reference's pass.

    TRL (trl 1.16) copies the adapter under the name "ref". It would be saved with each checkpoint, PEFT's parameters
    outside of modules (rows of embeddings, LoRA on embeddings) are left out of the copy, and with dropout the
    reference would drop, too.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        with gather_params_ctx(trained_weights(model), modifier_rank=None):
            self.weights = [parameter.detach().clone() for parameter in trained_weights(model)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give the model these weights inside, in evaluation mode."""
        training, present = self.model.training, self._exchange(self.weights)
        self.model.eval()
        try:
            yield
        finally:
            self.weights = self._exchange(present)  # as the engine has placed, cast and sharded them
            self.model.train(training)

    @torch.no_grad()
    def _exchange(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy weights into the model, in place, and return those that were there."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or the weights of the last forward would stay, and be used again
        parameters = trained_weights(self.model)
        with gather_params_ctx(parameters):
            before = [parameter.detach().clone() for parameter in parameters]
            for parameter, weight in zip(parameters, weights, strict=True):
                if isinstance(parameter, DTensor) and not isinstance(weight, DTensor):
                    weight = distribute_tensor(weight.to(parameter.device), parameter.device_mesh, parameter.placements)
                parameter.copy_(weight)
        return before
