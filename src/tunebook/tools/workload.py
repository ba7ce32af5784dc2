"""All that the memory and the checkpoints of a run depend on, from its recipe and the model's config alone."""

import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ..environment import Sharding
from ..recipe import Recipe
from ..recipe.configs import DPOConfig
from ..training.activation_checkpointing import accept_selective
from ..training.adapters import trained_adapter
from ..training.models import check_model, freeze_layers, meta_device

STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "muon": 1}  # tensors per parameter; Adam, the default, keeps two


@dataclass(frozen=True)
class Batch:
    """What one device runs at a time: `rows` of `length` tokens (a packed batch is one row), `scored` of them with a
    label. `keys`: tokens that a packed row attends to in all, where its documents share some."""

    rows: int
    length: int
    scored: int = 0
    keys: int | None = None
    packed: bool = False


@dataclass(frozen=True)
class Workload:
    """All that the memory of a run depends on."""

    config: PreTrainedConfig  # with the length of the tokenizer as `vocab_size` where the embeddings are resized
    task: str
    batch: Batch
    sharding: Sharding = Sharding()
    device: str = "cuda"  # or cpu
    dtype: str = "float32"  # that the weights are loaded in
    mixed: bool = False  # bf16 or fp16: DeepSpeed keeps 16-bit weights then, everything else casts them
    bits: int = 16  # of the frozen matrices under an adapter (load_in_4bit, load_in_8bit)
    peft_config: PeftConfig | None = None
    num_layers_unfrozen: int | None = None
    activation_checkpointing: bool = True
    activation_checkpointing_kwargs: dict[str, Any] | None = None
    accumulates: bool = False  # so that the gradients of earlier micro-batches are there when a batch begins
    optim: str = "adamw_torch_fused"
    reference: PreTrainedConfig | None = None  # of DPO's other model, where there is one during training
    ref_offload: bool = False
    keeps_adapter: bool = False  # as it was, for DPO's reference

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, config: PreTrainedConfig, batch: Batch, sharding: Sharding, device: str, accumulates: bool
    ) -> "Workload":
        """Return the workload of a recipe. `batch` is the one that processes of a context-parallel group share."""
        args, model_args = recipe.training, recipe.model
        # On a machine without a GPU, the config has unset what a GPU would take by default
        unset = device == "cuda" and args.use_cpu and not {"bf16", "fp16"} & recipe.given.keys()
        dtype = (config.dtype or torch.float32) if model_args.dtype in (None, "auto") else model_args.dtype
        reference, keeps_adapter = None, False
        if isinstance(args, DPOConfig):
            keeps_adapter = model_args.adapter_name_or_path is not None and args.ref_model_name_or_path is None
        if isinstance(args, DPOConfig) and not args.precompute_ref_log_probs:
            if args.ref_model_name_or_path is not None:
                reference = check_model(args.ref_model_name_or_path, args.ref_model_revision, args.trust_remote_code)
            elif not model_args.use_peft:
                reference = config
        keys: dict[str, Any] = {
            **vars(args),
            **vars(model_args),
            **{"config": config, "task": recipe.task, "sharding": sharding, "device": device},
            "batch": replace(batch, length=-(-batch.length // args.context_parallel_size)),
            "dtype": str(dtype).removeprefix("torch."),
            "mixed": args.bf16 or args.fp16 or unset,
            "bits": 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
            "peft_config": trained_adapter(recipe),
            "accumulates": accumulates,
            "reference": reference,
            "keeps_adapter": keeps_adapter,
        }
        return cls(**{field.name: keys[field.name] for field in fields(cls) if field.name in keys})

    @cached_property
    def model(self) -> PreTrainedModel | PeftModel:
        """Return what the run trains, on the meta device."""
        config = copy.deepcopy(self.config)
        if self.task == "rm":
            config.num_labels = 1
        architecture = AutoModelForSequenceClassification if self.task == "rm" else AutoModelForCausalLM
        with meta_device():
            model = architecture.from_config(config, dtype=self.compute_dtype)
            if self.num_layers_unfrozen is not None:
                freeze_layers(model, self.num_layers_unfrozen)
            accept_selective(model)
            if self.peft_config is not None:
                model = get_peft_model(model, copy.deepcopy(self.peft_config))
        if self.activation_checkpointing:
            # There is nothing to offload on the meta device: what a layer keeps is counted where it is
            model.activation_checkpointing_enable({**(self.activation_checkpointing_kwargs or {}), "offload": False})
        return model.train()

    @property
    def stored_size(self) -> int:
        """Return the bytes of a weight between steps."""
        return 2 if self.mixed and self.sharding.engine == "deepspeed" else getattr(torch, self.dtype).itemsize

    @property
    def compute_dtype(self) -> torch.dtype:
        engine_casts = self.mixed and self.sharding.engine in ("deepspeed", "fsdp")
        return torch.bfloat16 if engine_casts else getattr(torch, self.dtype)

    @property
    def autocasts(self) -> bool:
        return self.mixed and self.compute_dtype == torch.float32

    @property
    def state_size(self) -> int:
        """Return the bytes that the optimizer keeps per trained parameter, with DeepSpeed's own copy in float32."""
        states = next((count for name, count in STATES.items() if name in self.optim), 2)
        deepspeed = self.sharding.engine == "deepspeed"
        each = 1 if "8bit" in self.optim else 4 if deepspeed else self.stored_size
        return states * each + 4 * deepspeed

    def shards(self, stage: int) -> int:
        """Return over how many devices the part that a ZeRO stage shards is spread."""
        return self.sharding.processes if self.sharding.stage >= stage else 1

    @property
    def keeps_gradients(self) -> bool:
        """Return whether the gradients stay whole on the device until the step."""
        return self.shards(2) == 1 and self.sharding.engine != "fsdp"
