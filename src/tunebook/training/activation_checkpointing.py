"""`activation_checkpointing_kwargs: {selective: true}`: a layer keeps what is expensive to compute again and recomputes
the rest in the backward pass. TRL 1.16 has the key for SFT, where only the output of attention is kept."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ..errors import RecipeError

WEIGHT_ARGUMENT = {"aten.mm.default": 1, "aten.addmm.default": 2, "aten._grouped_mm.default": 1}


def keep_products(ctx: object, op: object, *args: torch.Tensor, **kwargs: object) -> CheckpointPolicy:
    """Keep attention, like TRL, and the widening projections (gate, up): half of a Llama layer's FLOPs. The output of
    the down projection is not needed in the backward pass; q, k, v and o, a quarter, are recomputed. LoRA's B is
    excluded: its output, more than eight times as wide as its input, is large for little compute."""
    name = str(op)
    if name in WEIGHT_ARGUMENT:
        inputs, outputs = args[WEIGHT_ARGUMENT[name]].shape[-2:]
        keep = inputs < outputs <= 8 * inputs
    else:
        keep = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def accept_selective(model: PreTrainedModel) -> None:
    """Accept `selective` among the keywords that checkpointing of `model` is enabled with, whoever enables it: the
    trainer, or what disabled it to generate or to score with the reference.

    Raises:
        RecipeError: when it is enabled, for `selective` with `use_reentrant`, and for `offload` on a CPU.
    """
    # PATCH(transformers<5.25): TRL enables checkpointing again with the recipe's keywords, of which only the Trainer
    # understands `every_n_layers` and `offload`, and none takes a policy. Waits for
    # transformers/modeling_utils.py:3151. Delete when gradient_checkpointing_enable takes all of them.
    enable = model._activation_checkpointing_enable

    def enable_selective(options: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False) -> None:
        options = {"use_reentrant": False, "every_n_layers": every_n_layers, "offload": offload, **(options or {})}
        every_n_layers, offload = options.pop("every_n_layers"), options.pop("offload")
        if offload and not torch.accelerator.is_available():
            raise RecipeError(
                "`activation_checkpointing_kwargs`: offload moves activations from an accelerator to the CPU, and "
                "there is no accelerator. Remove offload."
            )
        if options.pop("selective", False):
            if options["use_reentrant"]:
                raise RecipeError(
                    "`activation_checkpointing_kwargs`: selective needs use_reentrant: false, but it is true (under "
                    "ZeRO-3 with LoRA, always). Remove one of them."
                )
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        enable(options, every_n_layers, offload)

    model._activation_checkpointing_enable = enable_selective  # type: ignore[method-assign, assignment]
