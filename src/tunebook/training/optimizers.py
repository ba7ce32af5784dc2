"""Muon on the hidden matrices, AdamW on the rest, as one optimizer (`optim: muon`)."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..environment import launched_sharding
from ..errors import user_errors
from ..packing.context_parallel import TRLTrainer
from ..packing.forward import without_adapter
from ..recipe.configs import RunConfig

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

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for uses_muon, part in self.parts.items():
            # load_state_dict and FSDP put others in their place
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is uses_muon]
            part.state = self.state
            part.step()
        return loss


def hidden_matrices(model: PreTrainedModel | PeftModel) -> set[torch.Tensor]:
    """Return the weights that Muon trains: those of the backbone's linear layers that are trained as a whole.

    Embeddings are not linear layers; LM heads and reward heads are not in the backbone. LoRA's matrices are factors of
    an update, not weights. Routers of a mixture of experts choose classes, as a head does; like stacked experts they
    are not linear layers in transformers 5 (AFMoE's router is one, and goes to Muon).
    """
    backbone = without_adapter(model).base_model
    return {
        module.weight
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and "lora_" not in name
    }


def build_muon(model: PreTrainedModel | PeftModel, args: RunConfig, decayed: list[str]) -> torch.optim.Optimizer:
    """Return the optimizer of `model`. Under DeepSpeed it is DeepSpeed's own, since ZeRO's shards are not matrices.

    Args:
        decayed: names of the parameters with `weight_decay`, as the Trainer has them.

    Raises:
        ValueError: when there is nothing for Muon to train.
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError(
            "`optim: muon` has nothing to train: no linear layer of the model's body is trained as a whole. Set "
            "another `optim`."
        )
    learning_rate, weight_decay = args.muon_learning_rate, args.muon_weight_decay
    if learning_rate is None:
        learning_rate = args.learning_rate * 0.2 * math.sqrt(model.config.get_text_config().hidden_size)
    weight_decay = args.weight_decay if weight_decay is None else weight_decay
    muon = {"use_muon": True, "lr": learning_rate, "momentum": args.muon_momentum, "weight_decay": weight_decay}
    betas = (args.adam_beta1, args.adam_beta2)
    adamw = {"use_muon": False, "lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in trained.items() if p not in hidden}
    groups: list[dict[str, Any]] = [  # as torch has them
        {**adamw, "params": [p for name, p in rest.items() if name in decayed], "weight_decay": args.weight_decay},
        {**adamw, "params": [p for name, p in rest.items() if name not in decayed], "weight_decay": 0.0},
        {**muon, "params": [p for p in trained.values() if p in hidden]},
    ]
    log_groups(groups, args.max_grad_norm)
    groups = [group for group in groups if group["params"]]
    if args.deepspeed_plugin is None:
        return MuonWithAdamW(groups)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if launched_sharding(args).is_zero3:  # its Muon needs whole gradients
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_scatter"] = False

    # DeepSpeed's own rule, by name, would take reward heads and LoRA; it does not run for an optimizer made here
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True})


def log_groups(groups: list[dict[str, Any]], max_grad_norm: float) -> None:
    """Log how many parameters each side got and their learning rate, and warn of what may surprise."""
    # ZeRO-3 leaves an empty parameter in the place of each
    shapes = [[getattr(p, "ds_shape", p.shape) for p in group["params"]] for group in groups]
    adamw, muon = sum(map(math.prod, sum(shapes[:-1], []))), sum(map(math.prod, shapes[-1]))
    logger.info(
        "Muon trains %s parameters in %d matrices (learning rate %.3g), AdamW %s (%.3g).",
        *(f"{muon:,}", len(shapes[-1]), groups[-1]["lr"], f"{adamw:,}", groups[0]["lr"]),
    )
    stacked = sum(math.prod(shape) for shape in sum(shapes[:-1], []) if len(shape) > 2)
    if stacked:
        logger.warning("%s parameters of AdamW's are stacked experts: Muon takes single matrices.", f"{stacked:,}")
    if max_grad_norm:
        logger.warning(
            "max_grad_norm %g hardly limits the hidden matrices: Muon's step is as large for a small gradient as for a "
            "large one. It limits the rest.",
            max_grad_norm,
        )


class MuonMixin(TRLTrainer):
    """Mixin before a TRL trainer that has `optim: muon` and logs its learning rate."""

    def create_optimizer(self, model: PreTrainedModel | PeftModel | None = None) -> torch.optim.Optimizer:
        if self.args.optim == "muon" and self.optimizer is None:
            model = self.model if model is None else model
            with user_errors():
                self.optimizer = build_muon(model, self.args, self.get_decay_parameter_names(model))
        return super().create_optimizer(model)

    def _get_learning_rate(self) -> float:
        # PATCH(transformers<5.25): the Trainer logs the learning rate of the first group only, read before the
        # schedule's next step. Waits for transformers/trainer.py:1420. Delete when it logs one per group.
        if self.args.optim == "muon":
            assert self.optimizer is not None
            self.muon_learning_rate = self.optimizer.param_groups[-1]["lr"]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: float | None) -> None:
        if self.args.optim == "muon" and "learning_rate" in logs:
            logs["muon_learning_rate"] = self.muon_learning_rate
        super().log(logs, *args)
