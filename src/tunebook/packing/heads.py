"""What comes before a model's head and what the head does, for models of any architecture."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast
from unittest.mock import Mock, patch

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

PROBE = 4  # tokens
TOP_K = re.compile(r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k")  # a config's name for experts per token


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module whose hidden states the model's head takes. Where the class misnames it, it is named, so that
    `base_model`, by which TRL's fused head calls it, is not the model itself (Llama 4)."""
    if model.base_model is model:
        embeddings = model.get_input_embeddings()
        children = model.named_children()
        model.base_model_prefix = next(n for n, child in children if any(m is embeddings for m in child.modules()))
    return cast(PreTrainedModel, model.base_model).get_decoder()


def reward_head(classifier: PreTrainedModel) -> str:
    """Return the name of the one linear layer that makes a reward of a hidden state.

    Raises:
        ValueError: when there is none.
    """
    backbone = find_backbone(classifier)
    heads = [name for name, module in classifier.named_children() if backbone not in module.modules()]
    if len(heads) != 1 or not isinstance(classifier.get_submodule(heads[0]), nn.Linear | ModulesToSaveWrapper):
        raise ValueError(
            f"{type(classifier).__name__} is not a causal model with one linear head ({', '.join(heads)}), whose "
            "reward is read at the last token. Take a decoder."
        )
    return heads[0]


class Backbone:
    """The hooks of a model's backbone. In a call inside [`scoring`], they leave the hidden states of the scored tokens
    only, and keep the router logits."""

    def __init__(self, model: PreTrainedModel):
        self.module = find_backbone(model)
        self.positions: torch.Tensor | None = None
        self.routed = False
        self.router_logits: tuple[torch.Tensor, ...] = ()
        self.hidden = torch.empty(1, 0, 0)  # of the scored tokens, (1, N, width)
        self.handles = [
            self.module.register_forward_pre_hook(self._ask_for_routers, with_kwargs=True),
            self.module.register_forward_hook(self._select),
        ]

    @contextmanager
    def scoring(self, positions: torch.Tensor, routed: bool) -> Iterator[None]:
        """Score the tokens at `positions`, (N,), of the flattened batch; with `routed`, keep the router logits."""
        self.positions, self.routed, self.router_logits = positions, routed, ()
        try:
            yield
        finally:
            self.positions, self.hidden = None, torch.empty(1, 0, 0)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _ask_for_routers(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if self.positions is not None and self.routed:
            kwargs["output_router_logits"] = True
        return args, kwargs

    def _select(self, module: nn.Module, args: tuple[object, ...], outputs: ModelOutput) -> ModelOutput:
        if self.positions is not None:
            if self.routed:
                self.router_logits = outputs["router_logits"]
            hidden = outputs["last_hidden_state"]
            self.hidden = outputs["last_hidden_state"] = hidden.flatten(0, 1)[self.positions.to(hidden.device)][None]
        return outputs


def has_routers(model: PreTrainedModel) -> bool:
    """Return whether the model is a mixture of experts whose router logits can be had."""
    recorders = find_backbone(model)._can_record_outputs or {}
    router = recorders.get("router_logits")
    return router is not None and any(isinstance(m, router.target_class) for m in model.modules())


def balancing_loss(
    model: PreTrainedModel, router_logits: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the load-balancing loss (Switch Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6) over all
    layers, as the model's own code has it, else as transformers' Mixtral has it.

    Args:
        router_logits: of each layer, (tokens, experts), whose number is that of the config, whatever it calls them.
        mask: (B, L), which tokens count; None for all.

    Raises:
        ValueError: the model's own loss is of another kind, or the config does not say how many experts a token takes.
    """
    own = vars(sys.modules[type(model).__module__]).get("load_balancing_loss_func", load_balancing_loss_func)
    if "num_keys" in signature(own).parameters:
        raise ValueError(
            f"router_aux_loss_coef: {type(model).__name__} balances product keys, not experts. Set it to 0."
        )
    layers = tuple(logits.reshape(-1, logits.shape[-1]) for logits in router_logits)
    return own(layers, layers[0].shape[-1], experts_per_token(model.config.to_dict()), mask)


def experts_per_token(config: dict[str, Any]) -> int:
    """Return how many experts a token takes, whatever the config calls them.

    Raises:
        ValueError: when it does not say.
    """
    for values in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in values.items():
            if TOP_K.fullmatch(str(name)) and value is not None:
                return value
    raise ValueError(
        f"router_aux_loss_coef: the config of {config['model_type']} does not say how many experts a token takes. Set "
        "router_aux_loss_coef: 0."
    )


class _HeadInput(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states in the place of what a backbone returns; whatever else a model reads there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def fused_head_fits(
    model: PreTrainedModel,
    backbone: Backbone,
    own_forward: Callable[..., ModelOutput],
    fused_forward: Callable[..., ModelOutput],
) -> bool:
    """Return whether TRL's fused head, which knows a linear head and the common names of what is done to its logits,
    gives what the model's own head does to the same hidden states. They are those of a few tokens, and larger ones, in
    which a soft cap shows.

    It runs in the first forward that scores labels, when accelerate and PEFT have made of the head what they will.
    """
    head, base = model.get_output_embeddings(), set(model.base_model.parameters())
    others = {p for p in model.parameters() if p.requires_grad} - base - {head.weight, head.bias}
    if others:  # the fused head would not train them (LoRA on the head)
        return False
    device = cast(torch.Tensor, model.get_input_embeddings().weight).device
    ids, scored = torch.arange(2 * PROBE, device=device)[None], torch.arange(PROBE, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with backbone.scoring(scored, routed=False):
            logits = own_forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)["logits"]
            hidden, ids = backbone.hidden, ids[:, :PROBE]
        if logits.shape[1] != PROBE:
            raise ValueError(
                f"{type(model).__name__} does not make its logits from the last hidden state of its backbone, so that "
                "labelled positions cannot be scored. Take another model."
            )
        if hidden.shape[-1] != head.in_features:
            return False
        for scale in (1, 100):
            output = _HeadInput(last_hidden_state=scale * hidden)
            with patch.object(backbone.module, "forward", Mock(return_value=output)):
                logits = own_forward(input_ids=ids, use_cache=False)["logits"].float()
                fused = fused_forward(input_ids=ids, fused_lm_head=True, shift_labels=ids)["log_probs"]
            own = logits.log_softmax(dim=-1).gather(2, ids.to(logits.device)[..., None])[..., 0]
            if logits.shape[-1] != head.out_features or not torch.allclose(fused, own, rtol=0.02, atol=0.02):
                return False
    return True


def score_logits(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the per-token fields of TRL's `FusedCausalLMOutput` from logits, (N, V), and labels, (N,)."""
    log_probs = logits.float().log_softmax(dim=-1)
    fields = {"log_probs": log_probs.gather(1, targets[:, None])[:, 0]}
    with torch.no_grad():
        fields["entropy"] = torch.special.entr(log_probs.exp()).sum(dim=-1)
        fields["log_sum_sq_probs"] = (2 * log_probs).logsumexp(dim=-1)
        fields["mean_logits"] = logits.float().mean(dim=-1)
        fields["is_top1"] = logits.argmax(dim=-1) == targets
    return fields
