"""Packing in the model's forward: TRL's collators, trainers, losses, metrics and reference pass stay as they are.

The patched forward takes TRL's padded batch, runs the backbone over one packed row without the padding (and, where
chosen and rejected share a prompt, with it once), scores the labelled positions and puts the results where TRL
expects them.

transformers' models pass keyword arguments that they do not know on, from the forward to the backbone, its layers and
the attention function. Four of ours, besides the documents (`cu_seq_lens_q` and so on), travel that way:

- `positions`, (N,): the tokens of the row that are scored. Set by the patched forward; read by the backbone's hook
  `_select_positions`, which leaves only their hidden states.
- `key_index`, (keys,): the tokens that are each document's keys. Set by `pack_rows` for a shared prefix, and by
  `ContextGroup.split`; read by `varlen_attention`, and by the hook where there is no `counted`.
- `context`: the ranks that share the row. Set by `ContextGroup.split`; read by `varlen_attention` and the hook.
- `counted`, (keys,): the tokens of a row shared by ranks that the load-balancing loss counts, repetitions included. Set
  by `ContextGroup.take_share`; read by the hook.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from .attention import set_varlen_attention
from .context_parallel import Batch, ContextGroup
from .log_probs import head_for

PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def pack_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, share_prefix: bool) -> tuple[Batch, torch.Tensor]:
    """Lay the rows of a padded batch, left or right padded, one after the other in a single row.

    With `share_prefix`, rows i and i + B/2 share the tokens that they start with: of the second row only what follows
    is laid down (its last token at least), and its keys begin with the first row's.

    Args:
        input_ids, attention_mask: (B, L); every row has a token.

    Returns:
        The arguments of the backbone: input_ids and position_ids (1, T), and those of `varlen_attention`.
        source: (B, L), the place of each token in the packed row; 0 for padding.
    """
    order = (attention_mask == 0).argsort(dim=1, stable=True)  # a row's tokens, then its padding
    ids = input_ids.gather(1, order)
    length = attention_mask.sum(dim=1)
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    real = column < length[:, None]
    first = torch.zeros_like(length)  # the first token that a row lays down itself
    half = len(ids) // 2
    if share_prefix:
        same = (ids[:half] == ids[half:]) & real[:half] & real[half:]
        first[half:] = same.cumprod(dim=1).sum(dim=1).minimum(length[half:] - 1)
    own = real & (column >= first[:, None])
    queries = length - first
    end = queries.cumsum(0)
    source = (end - length)[:, None] + column
    if share_prefix:
        source[half:] = torch.where(own[half:], source[half:], source[:half])
    keys = length if share_prefix else queries
    packed = {
        "input_ids": ids[own][None],
        "position_ids": column[own][None],
        "cu_seq_lens_q": F.pad(end, (1, 0)).int(),
        "cu_seq_lens_k": F.pad(keys.cumsum(0), (1, 0)).int(),
        "max_length_q": int(queries.max()),
        "max_length_k": int(keys.max()),
        "key_index": source[real] if share_prefix else None,
    }
    return packed, torch.zeros_like(source).scatter(1, order, source * real)


@dataclass(frozen=True)
class Layout:
    """How a patched forward lays out a padded batch for the backbone, and finds the results again."""

    packing: bool
    share_prefix: bool
    context: ContextGroup | None

    def lay_out(self, batch: Batch, scored: torch.Tensor) -> tuple[Batch, torch.Tensor, torch.Tensor | slice]:
        """Return the backbone's arguments on this rank, the places of the scored tokens in them, and which of the
        scored tokens these are.

        Args:
            batch: TRL's; a row that its collator has packed (`cu_seq_lens_q`) is left as it is.
            scored: (N,), places in the flattened batch.
        """
        row, positions = batch, scored
        mine: torch.Tensor | slice = slice(None)
        if self.packing and "cu_seq_lens_q" not in batch:
            packed, source = pack_rows(batch["input_ids"], batch["attention_mask"], self.share_prefix)
            row, positions = {**batch, "attention_mask": None, **packed}, source.flatten()[scored]
        if self.context is not None:
            row, positions, mine = self.context.take_share(row, positions)
        return row, positions, mine

    def combine(self, x: torch.Tensor, mine: torch.Tensor | slice) -> torch.Tensor:
        """Return the results of all scored tokens, (N, ...), from this rank's."""
        return x if self.context is None or isinstance(mine, slice) else self.context.combine(x, mine)


def pack_causal_lm(
    model: nn.Module, packing: bool = True, share_prefix: bool = False, context: ContextGroup | None = None
) -> None:
    """Patch the forward of a causal LM that `trl.trainer.utils.add_fused_lm_head` has patched: with
    `fused_lm_head=True` it scores the labelled positions only, on every device, and returns what it returned before.
    All other calls (generation, logits) are the model's own.

    Args:
        model: a causal LM, or a PEFT model around one; policy or reference.
        packing: drop the padding; a batch that the collator has packed (`cu_seq_lens_q`) needs no flash-attn.
        share_prefix: the batch is pairs, chosen first (DPO); see `pack_rows`.
        context: with packing, the ranks that share each row. The loss is then None: TRL's trainers make their own.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    causal_lm, layout = without_adapter(model), Layout(packing, share_prefix, context)
    if packing:
        _check_packing(model, layout)
    fused_forward = causal_lm.forward

    def forward(
        self: PreTrainedModel,
        *args: object,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        return _score_labels(functools.partial(fused_forward, *args, fused_lm_head=True), layout, labels, kwargs)

    _replace_forward(causal_lm, forward, packing)


def _score_labels(
    fused_forward: Callable[..., FusedCausalLMOutput], layout: Layout, labels: torch.Tensor, batch: Batch
) -> FusedCausalLMOutput:
    label_mask = labels[:, 1:] != -100
    scored = F.pad(label_mask, (0, 1)).flatten().nonzero()[:, 0]
    row, positions, mine = layout.lay_out(batch, scored)
    targets = labels.flatten()[scored + 1][mine]
    with head_for(labels.device):
        output = fused_forward(shift_labels=targets[None], positions=positions, **row)
    label_mask = label_mask.to(output["log_probs"].device)
    fields = {name: layout.combine(output[name][0], mine) for name in PER_TOKEN_FIELDS if name in output}
    # masked_scatter keeps a batch without labels connected to the model, as TRL does
    fields = {name: x.new_zeros(label_mask.shape).masked_scatter(label_mask, x) for name, x in fields.items()}
    loss = output.loss if layout.context is None else None
    return FusedCausalLMOutput(loss=loss, label_mask=label_mask, aux_loss=output.aux_loss, **fields)


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """`logits` (B, num_labels), and the load-balancing loss of an MoE when called with `output_router_logits=True`."""

    aux_loss: torch.Tensor | None = None


def pack_reward_model(
    model: nn.Module, packing: bool = True, share_prefix: bool = False, context: ContextGroup | None = None
) -> None:
    """Patch the forward of a sequence classifier: it reads the reward at the last token of each row by the attention
    mask, whatever the pad token is, with the model's head, whatever its name, and returns a `RewardOutput`.

    Args:
        model: a sequence classifier, or a PEFT model around one. For the others see `pack_causal_lm`.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    classifier, layout = without_adapter(model), Layout(packing, share_prefix, context)
    heads = [name for name, module in classifier.named_children() if module is not classifier.base_model]
    if len(heads) != 1:
        raise ValueError(
            f"{type(classifier).__name__} is not a causal model with one head ({', '.join(heads)}), whose reward is "
            "read at the last token. Take a decoder."
        )
    if packing:
        _check_packing(model, layout)

    def forward(
        self: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> RewardOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(dim=1)
        scored = last + input_ids.shape[1] * torch.arange(len(last), device=last.device)
        row, positions, mine = layout.lay_out({"input_ids": input_ids, "attention_mask": mask, **kwargs}, scored)
        outputs = self.base_model(positions=positions, **row)
        hidden = layout.combine(outputs.last_hidden_state[0], mine)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            experts, per_token = self.config.num_experts, self.config.num_experts_per_tok
            mask = row["attention_mask"]
            aux_loss = cast(torch.Tensor, load_balancing_loss_func(outputs.router_logits, experts, per_token, mask))
        # The head is looked up on each call: PEFT and FSDP replace it
        return RewardOutput(logits=self.get_submodule(heads[0])(hidden), aux_loss=aux_loss)

    _replace_forward(classifier, forward, packing)


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return a model, or the one that a PEFT model is around."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _replace_forward(model: PreTrainedModel, forward: Callable[..., ModelOutput], packing: bool) -> None:
    """Give `model` a forward, and its backbone the hooks that this relies on in place of those of an earlier call."""
    for handle in vars(model).pop("packing_hooks", ()):
        handle.remove()
    hooks = [set_varlen_attention(model)] if packing else []
    vars(model)["packing_hooks"] = [*hooks, model.base_model.register_forward_hook(_select_positions, with_kwargs=True)]
    # PATCH(trl<1.17): TRL's DPO and reward trainers cannot pack, and its SFT packs on flash-attn only. Waits for
    # https://github.com/huggingface/trl/issues/2469. Delete when all three pack on every attention.
    # It is a bound method, since accelerate wraps these, with the signature by which generate() checks its arguments
    model.forward = types.MethodType(functools.wraps(type(model).forward)(forward), model)


def _check_packing(model: nn.Module, layout: Layout) -> None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"packing: {type(model.active_peft_config).__name__} puts virtual tokens before each row of a batch, and "
            "packing makes one row of them. Set packing: false."
        )
    rope = without_adapter(model).config.to_dict().get("rope_parameters") or {}  # of the model, or by type of layer
    rope_types = {x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)}
    if layout.context is not None and rope_types & {"dynamic", "longrope"}:
        raise ValueError(
            f"context_parallel_size: {type(without_adapter(model)).__name__} has rotary embeddings that depend on the "
            "longest document (dynamic, longrope), of which a process sees a part. Set context_parallel_size: 1."
        )
    for name, module in model.named_modules():
        if layout.share_prefix and isinstance(module, nn.Dropout) and module.p:
            raise ValueError(
                f"share_prefix: {name} has a dropout of {module.p}, and chosen and rejected would share what it drops "
                "in their prefix. Set disable_dropout: true, or share_prefix: false."
            )


def _select_positions(
    backbone: nn.Module, args: tuple[object, ...], kwargs: Batch, outputs: ModelOutput
) -> ModelOutput:
    if "positions" in kwargs:
        hidden = outputs["last_hidden_state"]
        outputs["last_hidden_state"] = hidden.flatten(0, 1)[kwargs["positions"].to(hidden.device)][None]
        counted = kwargs.get("counted", kwargs.get("key_index"))
        if counted is not None and "router_logits" in outputs:
            gather = kwargs["context"].gather if "context" in kwargs else nn.Identity()
            # A shared token counts for both of its documents in the load-balancing loss
            outputs["router_logits"] = tuple(gather(logits)[counted] for logits in outputs["router_logits"])
    return outputs
