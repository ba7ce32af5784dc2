"""Packing in the model's forward: TRL's collators, trainers, losses, metrics and reference pass stay as they are.

The patched forward takes TRL's padded batch, runs the backbone over one packed row without the padding (and, where
chosen and rejected share a prompt, with it once), scores the labelled positions and puts the results where TRL
expects them.
"""

import functools
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import trl.trainer.utils
from accelerate.utils import is_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from .attention import set_varlen_attention
from .context_parallel import ContextGroup
from .log_probs import LogProbs

PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def pack_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, share_prefix: bool
) -> tuple[dict[str, torch.Tensor | int | None], torch.Tensor]:
    """
    Lay the rows of a padded batch, left or right padded, one after the other in a single row.

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


def pack_causal_lm(
    model: nn.Module,
    packing: bool = True,
    share_prefix: bool = False,
    context: ContextGroup | None = None,
) -> None:
    """
    Patch the forward of a causal LM that `trl.trainer.utils.add_fused_lm_head` has patched: with `fused_lm_head=True`
    it scores the labelled positions only, on every device, and returns what it returned before. All other calls
    (generation, logits) are the model's own.

    Args:
        model: a causal LM, or a PEFT model around one; policy or reference.
        packing: drop the padding; a batch that the collator has packed (`cu_seq_lens_q`) needs no flash-attn.
        share_prefix: the batch is pairs, chosen first (DPO); see `pack_rows`.
        context: with packing, the ranks that share each row. The loss is then None: TRL's trainers make their own.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    if packing:
        _set_packing(model, share_prefix, context)
    model = model.get_base_model() if is_peft_model(model) else model
    model.base_model.register_forward_hook(_select_positions, with_kwargs=True)
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against the signature
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or "shift_labels" in kwargs:
            return fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        label_mask = labels[:, 1:] != -100
        source = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        if packing and "cu_seq_lens_q" not in kwargs:
            packed, source = pack_rows(kwargs.pop("input_ids"), kwargs.pop("attention_mask"), share_prefix)
            kwargs |= packed
        targets, positions = labels[:, 1:][label_mask], source[:, :-1][label_mask]
        if context is not None:
            kwargs, positions, mine = _take_share(context, kwargs, positions)
            targets = targets[mine]
        output = fused_forward(*args, fused_lm_head=True, shift_labels=targets[None], positions=positions, **kwargs)
        label_mask = label_mask.to(output.log_probs.device)
        fields = {name: output[name] for name in PER_TOKEN_FIELDS if name in output}
        if context is not None:
            fields = {name: context.combine(x[0], mine) for name, x in fields.items()}
            output.loss = None
        # masked_scatter keeps a batch without labels connected to the model, as TRL does
        fields = {name: x.new_zeros(label_mask.shape).masked_scatter(label_mask, x) for name, x in fields.items()}
        return FusedCausalLMOutput(loss=output.loss, label_mask=label_mask, aux_loss=output.aux_loss, **fields)

    model.forward = types.MethodType(forward, model)
    trl.trainer.utils._ChunkedLogProbFunction = LogProbs


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """`logits` (B, num_labels), and the load-balancing loss of an MoE when called with `output_router_logits=True`."""

    aux_loss: torch.Tensor | None = None


def pack_reward_model(
    model: nn.Module, packing: bool = True, share_prefix: bool = False, context: ContextGroup | None = None
) -> None:
    """
    Patch the forward of a sequence classifier: it reads the reward at the last token of each row by the attention
    mask, whatever the pad token is, with the model's head, whatever its name, and returns a `RewardOutput`.

    Args:
        model: a sequence classifier, or a PEFT model around one.
        packing: drop the padding.
        share_prefix: the batch is pairs, chosen first; see `pack_rows`.
        context: with packing, the ranks that share each row.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    classifier = model.get_base_model() if is_peft_model(model) else model
    heads = [name for name, module in classifier.named_children() if module is not classifier.base_model]
    if len(heads) != 1:
        raise ValueError(
            f"{type(classifier).__name__} is no causal model with one head ({', '.join(heads)}), whose reward is read "
            "at the last token. Take a decoder."
        )
    if packing:
        _set_packing(model, share_prefix, context)
    classifier.base_model.register_forward_hook(_select_positions, with_kwargs=True)

    @functools.wraps(type(classifier).forward)
    def forward(self, input_ids, attention_mask=None, **kwargs):
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (attention_mask * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(dim=1)
        if packing:
            packed, source = pack_rows(input_ids, attention_mask, share_prefix)
            kwargs |= packed
        else:
            source = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
            kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        positions = source.gather(1, last[:, None])[:, 0]
        if context is not None:
            kwargs, positions, mine = _take_share(context, kwargs, positions)
        outputs = self.base_model(positions=positions, **kwargs)
        hidden = outputs.last_hidden_state[0]
        if context is not None:
            hidden = context.combine(hidden, mine)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            config = self.config
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
            )
        # The head is looked up on each call: PEFT and FSDP replace it
        logits = self.get_submodule(heads[0])(hidden)
        return RewardOutput(logits=logits, aux_loss=aux_loss)

    classifier.forward = types.MethodType(forward, classifier)


def _take_share(context: ContextGroup, row: dict, positions: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The backbone's arguments for this rank's part of a row; its part of `positions`, and which of them these are."""
    part, place = context.split(row)
    counted = place if row.get("key_index") is None else place[row["key_index"]]
    mine, positions = context.own(place[positions], part["input_ids"].shape[1])
    return {**row, **part, "counted": counted}, positions, mine


def _set_packing(model: nn.Module, share_prefix: bool, context: ContextGroup | None) -> None:
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"packing: {type(model.active_peft_config).__name__} puts virtual tokens before each row of a batch, and "
            "packing makes one row of them. Set packing: false."
        )
    base_model = model.get_base_model() if is_peft_model(model) else model
    if base_model.config.get_text_config() is not base_model.config:
        raise ValueError(
            f"packing: {type(base_model).__name__} takes more than text, which packing would misplace. "
            "Set packing: false."
        )
    rope = base_model.config.to_dict().get("rope_parameters") or {}  # of the model, or by type of layer
    rope_types = {x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)}
    if context is not None and rope_types & {"dynamic", "longrope"}:
        raise ValueError(
            f"context_parallel_size: {type(base_model).__name__} has rotary embeddings that depend on the longest "
            "document (dynamic, longrope), of which a process sees a part. Set context_parallel_size: 1."
        )
    if share_prefix:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and module.p:
                raise ValueError(
                    f"share_prefix: {name} has a dropout of {module.p}, and chosen and rejected would share what it "
                    "drops in their prefix. Set disable_dropout: true, or share_prefix: false."
                )
    set_varlen_attention(base_model)


def _select_positions(backbone: nn.Module, args: tuple, kwargs: dict, outputs):
    if "positions" in kwargs:
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = hidden.flatten(0, 1)[kwargs["positions"].to(hidden.device)][None]
        counted = kwargs.get("counted", kwargs.get("key_index"))
        if counted is not None and "router_logits" in outputs:
            gather = kwargs["context"].gather if "context" in kwargs else nn.Identity()
            # A shared token counts for both of its documents in the load-balancing loss
            outputs.router_logits = tuple(gather(logits)[counted] for logits in outputs.router_logits)
    return outputs
