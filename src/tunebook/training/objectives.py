"""Objectives: the reward model's loss, and what TRL's DPO lacks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..recipe.configs import DPOConfig, RewardConfig


def reward_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float, args: RewardConfig
) -> torch.Tensor:
    """Return -logsigmoid(r_c - r_r - margin), or log(1 + exp(r_r - r_c + margin)) with `loss_type: logexp`, averaged
    over the pairs; plus `center_rewards_coefficient` * (r_c + r_r)^2 (https://arxiv.org/abs/2312.09244).

    Args:
        chosen, rejected, margin: (pairs,).
    """
    if args.loss_type == "logexp":
        loss = F.softplus(rejected - chosen + margin).mean()
    else:
        loss = -F.logsigmoid(chosen - rejected - margin).mean()
    if args.center_rewards_coefficient is not None:
        loss = loss + args.center_rewards_coefficient * (chosen + rejected).pow(2).mean()
    return loss


@dataclass(frozen=True)
class DPOObjective:
    """The arguments of TRL's DPO loss, and the terms that are added to it.

    delta is the log-ratio of policy and reference summed over the chosen tokens, less the same for the rejected ones.
    cDPO (https://ericmitchell.ai/cdpo.pdf), `label_smoothing` e with sigmoid: -(1-e) logsigmoid(x) - e logsigmoid(-x),
    x = beta * delta. TRL's `robust` loss with the label smoothing -e/(1-2e) is the same function.
    IPO on sums (https://arxiv.org/abs/2310.12036, eq. 17), `ipo_reduction: sum`: (delta - 1/(2 beta))^2, where TRL
    divides each side's log-ratio by its number of tokens.
    `nll_loss_coef` * the negative log-likelihood of the chosen side, mean over its tokens, then over the pairs
    (Llama 3, https://arxiv.org/abs/2407.21783, section 4.1.4).
    """

    loss_types: list[str]
    loss_weights: list[float]
    label_smoothing: float
    ipo_sum_weight: float
    nll_loss_coef: float

    @classmethod
    def from_args(cls, args: DPOConfig) -> "DPOObjective":
        """Turn cDPO into `robust`, and give the weight of IPO on sums to a term of its own."""
        types, weights = list(args.loss_type), list(args.loss_weights or [1.0] * len(args.loss_type))
        label_smoothing, ipo_sum_weight = args.label_smoothing, 0.0
        for i, name in enumerate(types):
            if name == "sigmoid" and args.label_smoothing:
                types[i] = "robust"
                label_smoothing = -args.label_smoothing / (1 - 2 * args.label_smoothing)
            elif name == "ipo" and args.ipo_reduction == "sum":
                ipo_sum_weight += weights[i]
                weights[i] = 0.0
        return cls(types, weights, label_smoothing, ipo_sum_weight, args.nll_loss_coef or 0.0)

    def added_terms(
        self, logps: torch.Tensor, inputs: dict[str, torch.Tensor], beta: float
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        """Return the sum of the terms, and what to log of them.

        Args:
            logps: (2B, L - 1) log-probabilities of the policy, chosen first, 0 where there is no label.
            inputs: TRL's batch, with `completion_mask` (2B, L), `ref_chosen_logps` and `ref_rejected_logps` (B,).
        """
        added: torch.Tensor | float = 0.0
        metrics: dict[str, torch.Tensor] = {}
        if self.ipo_sum_weight:
            chosen, rejected = logps.sum(dim=1).chunk(2)
            delta = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
            added = added + self.ipo_sum_weight * (delta - 1 / (2 * beta)).pow(2).mean()
        if self.nll_loss_coef:
            tokens = inputs["completion_mask"][:, 1:].sum(dim=1).chunk(2)[0].clamp(min=1)
            nll = (-logps.chunk(2)[0].sum(dim=1) / tokens).mean()
            added = added + self.nll_loss_coef * nll
            metrics["nll_loss"] = nll.detach()
        return added, metrics


def pair_metrics(pairs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is logged of pairs: accuracy, in which a tie counts half, the share of ties, and the margin.

    Args:
        pairs: (pairs, 2 or more), the rewards of both sides.
    """
    margin = pairs[:, 0] - pairs[:, 1]
    return {"accuracy": (margin.sign().mean() + 1) / 2, "ties": (margin == 0).float().mean(), "margin": margin.mean()}
