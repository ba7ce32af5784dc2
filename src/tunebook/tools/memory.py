"""Estimate the memory of a training step on one device from the model's config: no weights, no device.

Weights, gradients and optimizer states are arithmetic (ZeRO, https://arxiv.org/abs/1910.02054, section 3). Activations
are counted: the model's own forward and backward run on the meta device, where a tensor has a size but no data, and
the bytes that are alive at the same time are added up.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import disable_dropout_in_model

from ..packing.forward import without_adapter
from ..packing.heads import find_backbone, reward_head
from ..packing.log_probs import Context, _LinearLogProbs
from .workload import Workload

# Bytes of the process itself. CPU: the libraries and what glibc keeps of freed memory, the median over the runs of
# perf/memory.py. CUDA: context, kernels and what the caching allocator keeps, not measured.
PROCESS = {"cpu": 0.84e9, "cuda": 1.5e9}
BUCKET = 5e8  # elements of DeepSpeed's reduce_bucket_size, where the accelerate config names none
TILE = (4096, 32768)  # tokens and words that TRL's fused head scores at a time


@dataclass(frozen=True)
class Part:
    """A line of an estimate: bytes on one device, and why."""

    name: str
    bytes: float
    reason: str


def estimate(workload: Workload) -> list[Part]:
    """Estimate the memory of one device at the peak of a step, in parts that add up to it."""
    size, sharding = workload.stored_size, workload.sharding
    parameters, trained = (workload.model.num_parameters(only_trainable) for only_trainable in (False, True))
    weights = 0.0 if sharding.offload_weights else weights_size(workload) / workload.shards(3)
    gradients = trained * size / workload.shards(2)
    states = 0.0 if sharding.offload_optimizer else trained * workload.state_size / workload.shards(1)
    tokens = (
        f"{workload.batch.rows} x {workload.batch.length:,} tokens"
        + ", checkpointed" * workload.activation_checkpointing
    )
    try:
        activations = max(0.0, count_step(workload) - (gradients if workload.keeps_gradients else 0))
    except (RuntimeError, TypeError):  # what a layer does depends on data, or on a mask, that the meta device lacks
        activations, tokens = 0.0, f"not counted: {workload.config.model_type} does not run without data"
    parts = [
        Part("weights", weights, f"{parameters:,} parameters"),
        Part("gradients", gradients, f"{trained:,} trained parameters of {size} bytes"),
        Part("optimizer", states, f"{workload.state_size} bytes per trained parameter"),
        Part("activations", activations, tokens),
        reference(workload, activations),
        working_space(workload),
        Part("process", PROCESS[workload.device], "libraries, and what the allocator keeps"),
    ]
    return [part for part in parts if part is not None]


def reference(workload: Workload, activations: float) -> Part | None:
    """Return what DPO's reference adds to the peak, if there is one."""
    if workload.keeps_adapter:
        kept = workload.model.num_parameters(only_trainable=True) * workload.stored_size
        shards = workload.shards(3) if workload.sharding.engine == "fsdp" else 1
        return Part("reference", kept / shards, "the adapter as it was")
    if workload.reference is None:
        return None
    other = replace(
        workload, config=workload.reference, peft_config=None, num_layers_unfrozen=None, activation_checkpointing=False
    )
    other.model.requires_grad_(False)
    size = 0.0 if workload.sharding.offload_weights else weights_size(other) / workload.shards(3)
    if workload.ref_offload:  # it has left the device when the activations come
        return Part("reference", max(0.0, size - activations), "on the device for its pass only")
    return Part("reference", size, "DPO's reference")


def working_space(workload: Workload) -> Part | None:
    """Return what the engine and the quantization need for a moment, if anything."""
    model, size = workload.model, workload.stored_size
    trained = model.num_parameters(only_trainable=True)
    needs: dict[str, float] = {}
    if workload.bits < 16:
        needs["one matrix at a time dequantized"] = max(m.weight.numel() for m in frozen_matrices(model)) * 2.0
    if workload.shards(3) > 1:
        gathered = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer | nn.Embedding))
        needs["two layers at a time gathered"] = 2 * max(sum(p.nbytes for p in m.parameters()) for m in gathered)
    if workload.sharding.engine == "deepspeed":
        bucket = min(BUCKET, trained)
        needs[f"DeepSpeed's bucket of {bucket:,.0f} gradients"] = bucket * size
    if workload.sharding.engine == "ddp":
        needs["DDP's buckets, as large as the gradients"] = trained * size
    return Part("working space", sum(needs.values()), "; ".join(needs)) if needs else None


def weights_size(workload: Workload) -> float:
    """Return the bytes of all weights. With less than 16 bits the frozen matrices take these, and a float32 per block
    of 64 (QLoRA, https://arxiv.org/abs/2305.14314, section 3)."""
    bits = workload.bits
    quantized = sum(m.weight.numel() for m in frozen_matrices(workload.model)) if bits < 16 else 0
    return (workload.model.num_parameters() - quantized) * workload.stored_size + quantized * (bits / 8 + 4 / 64)


def frozen_matrices(model: nn.Module) -> list[nn.Linear]:
    """Return what bitsandbytes quantizes: every frozen linear layer but the head."""
    head = without_adapter(model).get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]


Named = Mapping[str, object] | None  # arguments


class LiveBytes(TorchDispatchMode):
    """Add up the storages that live between the operations inside; `peak` is the most there were at a time."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: Named = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, nbytes: int) -> None:
        self.live -= nbytes


def cast_linear(*args: object, linear: Callable[..., Tensor] = F.linear) -> Tensor:
    """Cast like autocast, which has no meta device: linear layers take and give 16-bit tensors, cast in the graph. (A
    TorchFunctionMode would be off where a checkpoint is computed again, inside of backward.)"""
    return linear(*(x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args))


def count_step(workload: Workload) -> int:
    """Count the most bytes alive in forward and backward besides the weights: activations, and the gradients where the
    device keeps them whole."""
    model, batch = replace(workload).model, workload.batch  # one of its own, since it is changed
    if workload.task != "sft":
        disable_dropout_in_model(model)
    AttentionInterface.register("counted", partial(attention, workload=workload))
    base_model = without_adapter(model)
    base_model.set_attn_implementation("counted")
    with (
        LiveBytes([*model.parameters(), *model.buffers()]) as count,
        # PATCH(transformers<5.25, torch<2.14): autocast has no meta device, and the grouped product takes bf16 only on
        # it. Waits for torch/amp/autocast_mode.py:230. Delete when both do what CUDA does.
        patch.object(F, "linear", cast_linear) if workload.autocasts else nullcontext(),
        patch.object(moe, "_can_use_grouped_mm", return_value=False),
    ):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if not workload.keeps_gradients:
                parameter.register_post_accumulate_grad_hook(drop_gradient)
            elif workload.accumulates:
                parameter.grad = torch.empty_like(parameter)
        ids = torch.empty(batch.rows, batch.length, dtype=torch.long, device="meta")
        hidden = find_backbone(base_model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        head = base_model.get_output_embeddings()
        hidden = hidden[torch.empty(batch.scored, dtype=torch.long, device="meta")]
        if workload.task == "rm":
            loss = base_model.get_submodule(reward_head(base_model))(hidden).float()
        elif workload.device == "cpu" and hidden.dtype == torch.float32 and not workload.autocasts:
            ids = torch.empty(batch.scored, dtype=torch.long, device="meta")
            loss = _LinearLogProbs.apply(hidden, head.weight, ids, ("entropy", "is_top1"))[0]
        else:
            loss = FusedHead.apply(hidden, head.weight)
        loss.sum().backward()
        model.zero_grad()
        del hidden, loss, ids
    return count.peak


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class FusedHead(torch.autograd.Function):
    """Allocate what TRL's head does on CUDA: a tile of logits in place of all of them, gradients in float32."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        allocate_tile(hidden, weight)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        tile = allocate_tile(hidden, weight)  # noqa: F841 - it lives while the gradients are written
        return tuple(
            torch.empty_like(x, dtype=torch.float32).to(x.dtype) if needed else None
            for x, needed in zip((hidden, weight), ctx.needs_input_grad, strict=True)
        )


def allocate_tile(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(min(len(hidden), TILE[0]), min(len(weight), TILE[1]))


def allocate_attention(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


# An operation, for selective checkpointing to know it by its name
flash_attention = torch.library.custom_op("tunebook::flash_attention", allocate_attention, mutates_args=())
flash_attention.register_fake(allocate_attention)


class FusedAttention(torch.autograd.Function):
    """Keep what a flash kernel keeps: query, key, value, output and a number per query; never tokens x tokens."""

    @staticmethod
    def forward(ctx: Context, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output, log_sum_exp = flash_attention(query, value)
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)  # type: ignore[arg-type]
        return output

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, workload: Workload, **kwargs: object
) -> tuple[Tensor, None]:
    """Return the shapes of varlen_attention (packed) or of transformers' sdpa (padded)."""
    batch, mask = workload.batch, None
    if workload.autocasts:
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    if batch.keys is not None:
        index = torch.empty(batch.keys, dtype=torch.long, device="meta")
        key, value = key[:, :, index], value[:, :, index]
    elif not batch.packed:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        mask = query.new_empty(batch.rows, 1, batch.length, batch.length) if batch.rows > 1 else None
    output = FusedAttention.apply(query, key, value, mask).transpose(1, 2)
    # Kernels on CUDA write the output in the order that the projection reads
    return (output.contiguous().clone() if workload.device == "cpu" else output.contiguous()), None
