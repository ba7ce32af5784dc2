"""Log-probabilities of labelled tokens from hidden states, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trl.trainer.utils
from torch import Tensor
from torch.autograd.function import FunctionCtx
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

Options = tuple[float, int, float | None, float, tuple[str, ...]]  # temperature, chunk size, softcap, scale, outputs
# Of each token: the fields of `FusedCausalLMOutput` in their order, None for one that is not asked for
PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@contextmanager
def head_for(device: torch.device) -> Iterator[None]:
    """Let `add_fused_lm_head` compute with [`LogProbs`] inside, if `device` is a CPU."""
    # PATCH(trl<1.17): on a CPU, TRL's function makes a dozen passes over the logits and computes them twice, and
    # add_fused_lm_head has no argument for another. Waits for trl/trainer/utils.py:1644. Delete when either changes.
    function = LogProbs if device.type == "cpu" else ChunkedLogProbFunction
    trl.trainer.utils._ChunkedLogProbFunction = function  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction  # type: ignore[misc]


class Context(FunctionCtx):
    """Of a function's forward and backward, with what torch leaves untyped."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class LogProbs:
    """Takes the arguments of TRL's `ChunkedLogProbFunction`, which computes what the other class here cannot."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: *Options) -> PerToken:
        temperature, _, softcap, logit_scale, outputs = options
        half = torch.is_autocast_enabled("cpu") or not hidden.dtype == torch.float32 == weight.dtype
        if half or bias is not None or softcap:
            return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *options)
        # needs_input_grad is true of a parameter under no_grad, too, and the logits would be kept for nothing
        weight = weight if torch.is_grad_enabled() else weight.detach()
        return _LinearLogProbs.apply(hidden * (logit_scale / temperature), weight, targets, outputs)


class _LinearLogProbs(torch.autograd.Function):
    """The fields of `FusedCausalLMOutput` for the logits `hidden @ weight.T`, (N, H) and (V, H). It makes the three
    products that forward and backward need, and two passes over the logits, which become the probabilities p in place:

        d log p[target] / d hidden = weight[target] - p @ weight
        entropy = log Z - p @ logits = log Z - (p @ weight) * hidden        (without gradient)
    """

    CHUNK_LOGITS = 2**24  # 64 MiB
    KEPT_LOGITS = 2**28  # 1 GiB: more are computed again in the backward

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> PerToken:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = max(1, _LinearLogProbs.CHUNK_LOGITS // len(weight))
        keep = needs_weight and len(hidden) * len(weight) <= _LinearLogProbs.KEPT_LOGITS
        buffer = hidden.new_empty(len(hidden) if keep else min(rows, len(hidden)), len(weight))
        log_probs, log_z, sum_sq_probs = hidden.new_empty(3, len(hidden))
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        expected = torch.empty_like(hidden) if needs_hidden or "entropy" in outputs else None  # p @ weight
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            p = buffer[chunk] if keep else buffer[: len(target)]
            torch.mm(hidden[chunk], weight.T, out=p)
            top, top_index = p.max(dim=-1, keepdim=True)
            logit = p.gather(1, target)
            torch.softmax(p, dim=-1, out=p)
            log_z[chunk] = (top - p.gather(1, top_index).log())[:, 0]
            log_probs[chunk] = logit[:, 0] - log_z[chunk]
            is_top1[chunk] = (top_index == target)[:, 0]
            if expected is not None:
                torch.mm(p, weight, out=expected[chunk])
            if "log_sum_sq_probs" in outputs:
                sum_sq_probs[chunk] = torch.linalg.vecdot(p, p)
        entropy = None if expected is None or "entropy" not in outputs else log_z - (expected * hidden).sum(-1)
        log_sum_sq_probs = sum_sq_probs.log() if "log_sum_sq_probs" in outputs else None
        mean_logits = hidden @ weight.mean(dim=0) if "mean_logits" in outputs else None
        others = (entropy, log_sum_sq_probs, mean_logits, is_top1 if "is_top1" in outputs else None)
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)
        direction = None if expected is None or not needs_hidden else weight[targets] - expected
        ctx.save_for_backward(hidden, weight, targets, direction, buffer if keep else None)  # type: ignore[arg-type]
        return log_probs, *others

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        hidden, weight, targets, direction, kept = ctx.saved_tensors
        grad_hidden = direction * grad[:, None] if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            scaled = hidden * grad[:, None]
            if kept is not None:
                grad_weight = torch.mm(kept.T, -scaled)
            else:
                with maybe_gather_lm_head_ctx(weight):  # ZeRO-3
                    grad_weight = torch.zeros_like(weight)
                    rows = max(1, _LinearLogProbs.CHUNK_LOGITS // len(weight))
                    for h, s in zip(hidden.split(rows), scaled.split(rows), strict=True):
                        logits = h @ weight.T
                        grad_weight.addmm_(torch.softmax(logits, dim=-1, out=logits).T, s, alpha=-1)
            grad_weight.index_add_(0, targets, scaled)
        return grad_hidden, grad_weight, None, None
