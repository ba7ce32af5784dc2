"""How much memory a training step takes on one device, from the model's config: no weights, no device.

Weights, gradients and optimizer states are arithmetic (ZeRO, https://arxiv.org/abs/1910.02054, section 3). Activations
are counted: the model's own forward and backward run on the meta device, where a tensor has a size but no data, and
the bytes that are alive at the same time are added up.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import disable_dropout_in_model

from ..environment import Sharding
from ..packing.log_probs import _LinearLogProbs
from ..training.activation_checkpointing import accept_selective
from ..training.models import freeze_layers

# Bytes beside the training's own. CPU: the libraries and what glibc keeps of freed memory, the median over the runs of
# perf/memory.py. CUDA: context, kernels and what the caching allocator keeps, not measured.
PROCESS = {"cpu": 0.84e9, "cuda": 1.5e9}
# Tensors that an optimizer keeps for each parameter, of its size; Adam, the default, keeps two
STATES = {"sgd": 0.0, "adafactor": 0.0, "lion": 1.0, "muon": 1.0, "8bit": 0.5}
BUCKET = 5e8  # elements of DeepSpeed's reduce_bucket_size, where the accelerate config names none
ALONE = Sharding()
TILE = (4096, 32768)  # tokens and words that TRL's fused head scores at a time


@dataclass(frozen=True)
class Batch:
    """What one device runs at a time: `rows` of `length` tokens (a packed batch is one row), `scored` of them with a
    label. `keys`: of a packed row whose documents share some, how many they attend to in all."""

    rows: int
    length: int
    scored: int = 0
    keys: int | None = None
    packed: bool = False


@dataclass(frozen=True)
class Part:
    """A line of an estimate: bytes on one device, and why."""

    name: str
    bytes: float
    reason: str


def estimate(
    config: PreTrainedConfig,
    task: str,
    batch: Batch,
    sharding: Sharding = ALONE,
    device: str = "cuda",
    *,
    dtype: str = "float32",
    mixed: bool = False,
    bits: int = 16,
    peft_config: PeftConfig | None = None,
    num_layers_unfrozen: int | None = None,
    activation_checkpointing: bool = True,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    accumulates: bool = False,
    optim: str = "adamw_torch_fused",
    reference: PreTrainedConfig | None = None,
    ref_offload: bool = False,
) -> list[Part]:
    """
    The memory of one device at the peak of a step, in parts that add up to it.

    Args:
        config: with the length of the tokenizer as `vocab_size` where the embeddings are resized.
        task: sft, rm or dpo.
        device: cuda or cpu.
        dtype: that the weights are loaded in.
        mixed: bf16 or fp16 computation; DeepSpeed keeps 16-bit weights then, everything else casts them.
        bits: of the frozen matrices under an adapter (load_in_4bit, load_in_8bit).
        accumulates: the gradients of earlier micro-batches are there when a batch begins.
        reference: of DPO's other model, where there is one during training.
    """
    engine, shards = sharding.engine, sharding.processes
    deepspeed, fsdp = engine == "deepspeed", engine == "fsdp"
    stored = getattr(torch, dtype)
    stored_size = 2 if mixed and deepspeed else stored.itemsize
    compute = torch.bfloat16 if mixed and (deepspeed or fsdp) else stored
    model = build_model(config, task, compute, peft_config, num_layers_unfrozen).train()
    if activation_checkpointing:
        # there is nothing to offload on the meta device: what a layer keeps is counted where it is
        model.activation_checkpointing_enable({**(activation_checkpointing_kwargs or {}), "offload": False})
    of_weights, of_gradients, of_states = (shards if sharding.stage >= stage else 1 for stage in (3, 2, 1))

    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = weights_size(model, stored_size, bits) / of_weights
    working, work = 0.0, []
    if bits < 16:
        working += max(m.weight.numel() for m in frozen_matrices(model)) * 2.0
        work.append("one matrix at a time dequantized")
    if of_weights > 1:
        working += 2 * max(sum(p.nbytes for p in m.parameters()) for m in gathered_modules(model))
        work.append("two layers at a time gathered")
    if deepspeed:
        working += min(BUCKET, trained) * stored_size
        work.append(f"DeepSpeed's bucket of {min(BUCKET, trained):,.0f} gradients")
    if engine == "ddp":
        working += trained * stored_size
        work.append("DDP's buckets, as large as the gradients")

    gradients = trained * stored_size / of_gradients
    state_size = optimizer_size(optim, stored_size, deepspeed)
    optimizer = trained * state_size / of_states
    keeps = of_gradients == 1 and not fsdp
    step = count_step(model, task, batch, device, mixed and compute == torch.float32, keeps, keeps and accumulates)
    activations = max(0.0, step - gradients) if keeps else step

    parts = [
        Part("weights", 0.0 if sharding.offload_weights else weights, f"{total:,} parameters"),
        Part("gradients", gradients, f"{trained:,} trained parameters of {stored_size} bytes"),
        Part("optimizer", 0.0 if sharding.offload_optimizer else optimizer, f"{state_size:g} bytes each of them"),
        Part(
            "activations",
            activations,
            f"{batch.rows} x {batch.length:,} tokens" + (", checkpointed" if activation_checkpointing else ""),
        ),
    ]
    if reference is not None:
        other = build_model(reference, task).requires_grad_(False)
        size = 0.0 if sharding.offload_weights else weights_size(other, stored_size, bits) / of_weights
        # A reference that comes for its pass only is gone when the activations come
        extra = max(0.0, size - activations) if ref_offload else size
        parts.append(Part("reference", extra, "on the device for its pass only" if ref_offload else "DPO's reference"))
    if working:
        parts.append(Part("working space", working, "; ".join(work)))
    return [*parts, Part("process", PROCESS[device], "libraries, and what the allocator keeps")]


def weights_size(model: nn.Module, size: int, bits: int) -> float:
    """Bytes of the weights, `size` each; with less than 16 `bits` the frozen matrices take these, and a float32 for
    each block of 64 (QLoRA, https://arxiv.org/abs/2305.14314, section 3)."""
    quantized = sum(m.weight.numel() for m in frozen_matrices(model)) if bits < 16 else 0
    return (sum(p.numel() for p in model.parameters()) - quantized) * size + quantized * (bits / 8 + 4 / 64)


def optimizer_size(optim: str, size: int, deepspeed: bool) -> float:
    """Bytes that an optimizer keeps for a trained parameter of `size` bytes; under DeepSpeed with the parameter itself
    in float32."""
    states = next((count for name, count in STATES.items() if name in optim), 2.0)
    return 4 * (states + 1) if deepspeed else size * states


def build_model(
    config: PreTrainedConfig,
    task: str,
    dtype: torch.dtype = torch.float32,
    peft_config: PeftConfig | None = None,
    num_layers_unfrozen: int | None = None,
) -> PreTrainedModel | PeftModel:
    """What a run trains, on the meta device."""
    config = copy.deepcopy(config)
    if task == "rm":
        config.num_labels = 1
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if task == "rm" else AutoModelForCausalLM).from_config(
            config, dtype=dtype
        )
        if num_layers_unfrozen is not None:
            freeze_layers(model, num_layers_unfrozen)
        accept_selective(model)
        return model if peft_config is None else get_peft_model(model, copy.deepcopy(peft_config))


def frozen_matrices(model: nn.Module) -> list[nn.Linear]:
    """What bitsandbytes quantizes: every linear layer but the head."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]


def gathered_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time where weights are sharded: a layer, or the embeddings."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | nn.Embedding):
            yield module


# ---- Counting ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that live between the operations inside; `peak` is the most there were at a time."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, nbytes: int) -> None:
        self.live -= nbytes


def cast_linear(*args, linear=F.linear):
    """Autocast, which knows no meta device: linear layers take and give 16-bit tensors, cast in the graph. (A
    TorchFunctionMode would be off where a checkpoint is computed again, inside of backward.)"""
    return linear(*(x.to(torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in args))


def count_step(
    model: PreTrainedModel | PeftModel,
    task: str,
    batch: Batch,
    device: str,
    mixed: bool,
    keeps: bool,
    accumulates: bool,
) -> int:
    """The most bytes alive in forward and backward, beside the weights: activations, and gradients where the device
    `keeps` them whole."""
    if task != "sft":
        disable_dropout_in_model(model)
    AttentionInterface.register("counted", partial(attention, batch=batch, device=device, mixed=mixed))
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    base_model.set_attn_implementation("counted")
    trained = [p for p in model.parameters() if p.requires_grad]
    with (
        LiveBytes([*model.parameters(), *model.buffers()]) as count,
        patch.object(F, "linear", cast_linear) if mixed else nullcontext(),
        # The kernel's meta version takes bf16 only (torch 2.13)
        patch.object(moe, "_can_use_grouped_mm", return_value=False),
    ):
        for parameter in trained:
            if accumulates:
                parameter.grad = torch.empty_like(parameter)
            if not keeps:
                parameter.register_post_accumulate_grad_hook(drop_gradient)
        ids = torch.empty(batch.rows, batch.length, dtype=torch.long, device="meta")
        hidden = base_model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = hidden[torch.empty(batch.scored, dtype=torch.long, device="meta")]
        if task == "rm":
            loss = base_model.score(hidden).float()
        elif device == "cpu" and hidden.dtype == torch.float32 and not mixed:
            weight = base_model.get_output_embeddings().weight
            ids = torch.empty(batch.scored, dtype=torch.long, device="meta")
            loss = _LinearLogProbs.apply(hidden, weight, ids, ("entropy", "is_top1"))[0]
        else:
            loss = FusedHead.apply(hidden, base_model.get_output_embeddings().weight)
        loss.sum().backward()
        model.zero_grad()
        del hidden, loss, ids
    return count.peak


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class FusedHead(torch.autograd.Function):
    """What TRL's head allocates on CUDA: a tile of logits in place of all of them, gradients in float32."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        tile = hidden.new_empty(min(len(hidden), TILE[0]), min(len(weight), TILE[1]))
        del tile
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        tile = hidden.new_empty(min(len(hidden), TILE[0]), min(len(weight), TILE[1]))
        grads = [
            torch.empty_like(x, dtype=torch.float32).to(x.dtype) if needed else None
            for x, needed in zip((hidden, weight), ctx.needs_input_grad, strict=True)
        ]
        del tile
        return tuple(grads)


def allocate_attention(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


# An operation, for selective checkpointing to know it by its name
flash_attention = torch.library.custom_op("tunebook::flash_attention", allocate_attention, mutates_args=())
flash_attention.register_fake(allocate_attention)


class FusedAttention(torch.autograd.Function):
    """What a flash kernel keeps: query, key, value, output and a number a query; never tokens x tokens."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output, log_sum_exp = flash_attention(query)
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attention(module, query, key, value, attention_mask, *, batch: Batch, device: str, mixed: bool, **kwargs):
    """The shapes of varlen_attention (packed) and of transformers' sdpa (padded)."""
    if mixed:
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    mask = None
    if batch.keys is not None:
        index = torch.empty(batch.keys, dtype=torch.long, device="meta")
        key, value = key[:, :, index], value[:, :, index]
    elif not batch.packed:
        groups = module.num_key_value_groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        mask = query.new_empty(batch.rows, 1, batch.length, batch.length) if batch.rows > 1 else None
    output = FusedAttention.apply(query, key, value, mask).transpose(1, 2)
    # Kernels on CUDA write the output in the order that the projection reads
    return (output.contiguous().clone() if device == "cpu" else output.contiguous()), None
