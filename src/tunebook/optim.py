"""Muon on the hidden matrices, AdamW on the rest, as one optimizer (`optim: muon`)."""

import logging
import math
import os
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups with `use_muon`, torch's AdamW for the others: one list of groups for the schedule,
    one state for the checkpoint."""

    def __init__(self, groups: list[dict[str, Any]]):
        self.parts = {
            True: torch.optim.Muon([group for group in groups if group["use_muon"]]),
            False: torch.optim.AdamW([group for group in groups if not group["use_muon"]], fused=True),
        }
        super().__init__(self.parts[False].param_groups + self.parts[True].param_groups, {})

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for uses_muon, part in self.parts.items():
            # load_state_dict and FSDP put others in their place
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is uses_muon]
            part.state = self.state
            part.step()
        return loss


def hidden_matrices(model: PreTrainedModel | PeftModel) -> set[torch.nn.Parameter]:
    """Weights that Muon trains: those of the backbone's linear layers that are trained as a whole.

    Embeddings are no linear layers, LM heads and reward heads no part of the backbone. LoRA's matrices are factors of
    an update, not weights. Routers of a mixture of experts choose classes, as a head does; like stacked experts they
    are no linear layers in transformers 5 (AFMoE's router is one, and goes to Muon).
    """
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    return {
        module.weight
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and "lora_" not in name
    }


def build_muon(
    model: PreTrainedModel | PeftModel, args: TrainingArguments, decayed: list[str]
) -> torch.optim.Optimizer:
    """The optimizer of `model`; under DeepSpeed its own Muon, since ZeRO's shards are no matrices. `decayed`: names of
    the parameters with `weight_decay`, as the Trainer has them.

    Raises:
        ValueError: when there is nothing for Muon to train.
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError(
            "`optim: muon` has nothing to train: no linear layer of the model's body is trained as a whole. Take "
            "another optimizer."
        )
    learning_rate, weight_decay = args.muon_learning_rate, args.muon_weight_decay
    if learning_rate is None:
        learning_rate = args.learning_rate * 0.2 * math.sqrt(model.config.get_text_config().hidden_size)
    muon = {
        "use_muon": True,
        "lr": learning_rate,
        "momentum": args.muon_momentum,
        "weight_decay": args.weight_decay if weight_decay is None else weight_decay,
    }
    adamw = {
        "use_muon": False,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in trained.items() if p not in hidden}
    groups = [
        {**adamw, "params": [p for name, p in rest.items() if name in decayed], "weight_decay": args.weight_decay},
        {**adamw, "params": [p for name, p in rest.items() if name not in decayed], "weight_decay": 0.0},
        {**muon, "params": [p for p in trained.values() if p in hidden]},
    ]
    log_groups(groups, args.max_grad_norm)
    groups = [group for group in groups if group["params"]]
    if args.deepspeed_plugin is None:
        return MuonWithAdamW(groups)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    # DeepSpeed's own rule, by name, would take reward heads and LoRA; it does not run for an optimizer made here
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True})


def log_groups(groups: list[dict[str, Any]], max_grad_norm: float) -> None:
    """How many parameters and which learning rate each side got, and what may surprise."""
    shapes = [[parameter_shape(p) for p in group["params"]] for group in groups]
    sizes = [sum(map(math.prod, group)) for group in shapes]
    logger.info(
        "Muon trains %s parameters in %d matrices (learning rate %.3g), AdamW %s (%.3g).",
        f"{sizes[-1]:,}",
        len(shapes[-1]),
        groups[-1]["lr"],
        f"{sum(sizes[:-1]):,}",
        groups[0]["lr"],
    )
    stacked = sum(math.prod(shape) for group in shapes[:-1] for shape in group if len(shape) > 2)
    if stacked:
        logger.warning("%s parameters of AdamW's are stacked experts: Muon takes single matrices.", f"{stacked:,}")
    if max_grad_norm:
        logger.warning(
            "max_grad_norm %g hardly limits the hidden matrices: Muon's step is as large for a small gradient as for a "
            "large one. It limits the rest.",
            max_grad_norm,
        )


def parameter_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Its shape in the layer; ZeRO-3 leaves an empty parameter in its place."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def check_muon(args: TrainingArguments) -> None:
    """Whether Muon can run under this launch; called when the recipe is parsed.

    Raises:
        ValueError: for an optimizer on the CPU, FSDP1, DeepSpeed's own optimizer or schedule, and clipping under
            DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") == "1":
            raise ValueError("`optim: muon` needs whole matrices, which FSDP1 flattens. Set fsdp_version: 2.")
        if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
            raise ValueError("`optim: muon` cannot run with fsdp_offload_params: true, on the CPU. Take fsdp2.yaml.")
    if args.deepspeed_plugin is None:
        return
    config = args.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ValueError(
            "`optim: muon` cannot run with an optimizer offloaded to the CPU. Take zero3.yaml or fsdp2.yaml."
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"`optim: muon` and the DeepSpeed config's `{section}`, which would take its place. Remove the section."
            )
    if args.max_grad_norm:
        # deepspeedai/DeepSpeed#8439, seen in 0.19.8
        raise ValueError(
            f"`max_grad_norm` {args.max_grad_norm} with `optim: muon`: DeepSpeed clips steps instead of gradients, "
            "which divides each by a number that grows with the model. Set max_grad_norm: 0."
        )
    if zero.get("stage") == 3:
        zero["reduce_scatter"] = False  # DeepSpeed's Muon needs whole gradients
