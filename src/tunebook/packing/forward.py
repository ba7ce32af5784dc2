"""Packing in the model's forward: TRL's collators, trainers, losses, metrics and reference pass stay as they are.

The patched forward takes TRL's padded batch, runs the backbone over one packed row without the padding (and, where
chosen and rejected share a prompt, with it once), scores the labelled positions and puts the results where TRL
expects them.

transformers' models pass keyword arguments that they do not know on, from the forward to the backbone, its layers and
the attention function. Two of ours, besides the documents (`cu_seq_lens_q` and so on), travel that way, both read by
`varlen_attention`:

- `key_index`, (keys,): the tokens that are each document's keys. Set by `pack_rows` for a shared prefix, and by
  `ContextGroup.split`.
- `context`: the ranks that share the row. Set by `ContextGroup.split`.

The backbone gives the head the scored positions only: see [`Backbone`].
"""

import functools
import logging
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from .attention import packed_row, set_varlen_attention
from .context_parallel import Batch, ContextGroup, LaidOut
from .dropout import find_dropout
from .heads import Backbone, balancing_loss, fused_head_fits, reward_head, score_logits
from .log_probs import head_for

logger = logging.getLogger(__name__)

OWN_HEAD = (
    "%s does more between its backbone and its logits than TRL's fused head: its own head scores the labelled tokens, "
    "which keeps %d logits of each in memory."
)
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
    packed: Batch = {
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

    def lay_out(
        self, batch: Batch, scored: torch.Tensor, laid_out: LaidOut
    ) -> tuple[Batch, torch.Tensor, torch.Tensor | slice]:
        """Return the backbone's arguments on this rank, the places of the scored tokens in them, and which of the
        scored tokens these are.

        Args:
            batch: TRL's; a row that its collator has packed (`cu_seq_lens_q`) is left as it is.
            scored: (N,), places in the flattened batch.
            laid_out: what [`LayoutCollator`] has found; else it is found here, and a GPU is waited for.
        """
        row, positions = batch, scored
        mine: torch.Tensor | slice = slice(None)
        if self.packing and "cu_seq_lens_q" not in batch:
            mask = batch["attention_mask"]
            assert mask is not None
            if "row" in laid_out:
                packed, source = laid_out["row"], laid_out["source"]
            else:
                packed, source = pack_rows(batch["input_ids"], mask, self.share_prefix)
            row, positions = {**batch, "attention_mask": None, **packed}, source.flatten()[scored]
        if self.context is not None:
            row, positions, mine = self.context.take_share(row, positions)
        return row, positions, mine

    def combine(self, x: torch.Tensor, mine: torch.Tensor | slice) -> torch.Tensor:
        """Return the results of all scored tokens, (N, ...), from this rank's."""
        return x if self.context is None or isinstance(mine, slice) else self.context.combine(x, mine)


def find_scored(labelled: torch.Tensor) -> torch.Tensor:
    """Return the places, (N,), in the flattened batch of the tokens before the labelled ones, from (B, L)."""
    return F.pad(labelled[:, 1:], (0, 1)).flatten().nonzero()[:, 0]


def pack_causal_lm(
    model: nn.Module, packing: bool = True, share_prefix: bool = False, context: ContextGroup | None = None
) -> None:
    """Patch the forward of a causal LM that `trl.trainer.utils.add_fused_lm_head` has patched: with
    `fused_lm_head=True` it scores the labelled positions only, on every device, and returns what it returned before.
    All other calls (generation, logits) are the model's own.

    Where TRL's fused head is not what the model does between its backbone and its logits, the model's own head scores
    the labelled positions.

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
    own_forward = functools.partial(fused_forward, fused_lm_head=False)
    backbone = _hook_backbone(causal_lm, packing)
    fused: bool | None = None

    def forward(
        self: PreTrainedModel,
        *args: object,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        nonlocal fused
        laid_out = cast(LaidOut, kwargs.pop("laid_out", {}))
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        if fused is None:
            with head_for(labels.device):
                fused = torch.compiler.disable(fused_head_fits)(self, backbone, own_forward, fused_forward)
            if not fused:
                logger.info(OWN_HEAD, type(self).__name__, self.config.get_text_config().vocab_size)
        score = functools.partial(_score_fused, fused_forward) if fused else functools.partial(_score_own, own_forward)
        # PATCH(trl<1.17, accelerate<1.16): the fused head reads the weights of a head that it does not call, and gives
        # each shard the gradient of its own rank alone, unless accelerate has put the head in a unit with the norm
        # before it, which it does not find under PEFT and in OPT. Waits for trl/trainer/utils.py:1636. Delete when TRL
        # calls the head, or unshards it.
        if isinstance(head := self.get_output_embeddings(), FSDPModule):
            head.unshard()
        score, batch = functools.partial(score, *args), cast(Batch, kwargs)
        return _score_labels(score, self, backbone, layout, labels, batch, laid_out)

    _replace_forward(causal_lm, forward)


def _score_fused(
    forward: Callable[..., ModelOutput], *args: object, targets: torch.Tensor, **batch: object
) -> dict[str, torch.Tensor]:
    with head_for(targets.device):
        output = forward(*args, fused_lm_head=True, shift_labels=targets[None], **batch)
    return {name: output[name][0] for name in PER_TOKEN_FIELDS if name in output}


def _score_own(
    forward: Callable[..., ModelOutput], *args: object, targets: torch.Tensor, **batch: object
) -> dict[str, torch.Tensor]:
    logits = forward(*args, **{**batch, "use_cache": False})["logits"][0]
    return score_logits(logits, targets.to(logits.device))


def _score_labels(
    score: Callable[..., dict[str, torch.Tensor]],
    model: PreTrainedModel,
    backbone: Backbone,
    layout: Layout,
    labels: torch.Tensor,
    batch: Batch,
    laid_out: LaidOut,
) -> FusedCausalLMOutput:
    config, items = model.config.get_text_config(), batch.pop("num_items_in_batch", None)
    routed = batch.pop("output_router_logits", None)
    if routed is None:
        routed = config.to_dict().get("output_router_logits", False)
    # Else TRL's head and the model's own forward make the load-balancing loss, of the scored positions only
    silent = {"output_router_logits": False} if routed else {}
    label_mask = labels[:, 1:] != -100
    scored = laid_out["scored"] if "scored" in laid_out else find_scored(labels != -100)
    row, positions, mine = layout.lay_out(batch, scored, laid_out)
    counted = row.pop("counted", row.get("key_index"))
    with backbone.scoring(positions, routed), packed_row() if layout.packing else nullcontext():
        own = score(targets=labels.flatten()[scored + 1][mine], **row, **silent)
    label_mask = label_mask.to(own["log_probs"].device)
    fields = {name: layout.combine(x, mine) for name, x in own.items()}
    loss = -fields["log_probs"].sum() / (label_mask.sum().clamp(min=1) if items is None else items)
    # masked_scatter keeps a batch without labels connected to the model, as TRL does
    fields = {name: x.new_zeros(label_mask.shape).masked_scatter(label_mask, x) for name, x in fields.items()}
    aux_loss = None
    if routed:
        aux_loss = _balance(model, backbone, layout, row, counted)
        loss = loss + config.to_dict().get("router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=None if layout.context else loss, label_mask=label_mask, aux_loss=aux_loss, **fields
    )


def _balance(
    model: PreTrainedModel, backbone: Backbone, layout: Layout, row: Batch, counted: torch.Tensor | None
) -> torch.Tensor:
    """Return the load-balancing loss of a batch that the backbone has run.

    Args:
        counted: (tokens,), of the row, repetitions included: a shared token counts for both of its documents.
    """
    router_logits = backbone.router_logits
    if counted is not None:
        gather = nn.Identity() if layout.context is None else layout.context.gather
        router_logits = tuple(gather(logits)[counted] for logits in router_logits)
    return balancing_loss(model, router_logits, row.get("attention_mask"))


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """`logits` (B, num_labels), and the load-balancing loss of an MoE when called with `output_router_logits=True`."""

    aux_loss: torch.Tensor | None = None


def pack_reward_model(
    model: nn.Module, packing: bool = True, share_prefix: bool = False, context: ContextGroup | None = None
) -> None:
    """Patch the forward of a sequence classifier: it reads the reward at the last token of each row by the attention
    mask, whatever the pad token is, with the model's head, whatever its name, and returns a `RewardOutput`. Called with
    `own_forward=True` it is the model's own.

    Args:
        model: a sequence classifier, or a PEFT model around one. For the others see `pack_causal_lm`.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    classifier, layout = without_adapter(model), Layout(packing, share_prefix, context)
    backbone = _hook_backbone(classifier, packing)
    head = reward_head(classifier)
    if packing:
        _check_packing(model, layout)

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_router_logits: bool = False,
        own_forward: bool = False,
        laid_out: LaidOut | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        if own_forward:
            return type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(dim=1)
        scored = last + input_ids.shape[1] * torch.arange(len(last), device=last.device)
        batch = cast(Batch, {"input_ids": input_ids, "attention_mask": mask, **kwargs})
        row, positions, mine = layout.lay_out(batch, scored, laid_out or {})
        counted = row.pop("counted", row.get("key_index"))
        with backbone.scoring(positions, output_router_logits), packed_row() if layout.packing else nullcontext():
            hidden = self.base_model(**row).last_hidden_state
        # The head is looked up on each call: PEFT and FSDP replace it
        logits = self.get_submodule(head)(layout.combine(hidden[0], mine))
        aux_loss = _balance(self, backbone, layout, row, counted) if output_router_logits else None
        return RewardOutput(logits=logits, aux_loss=aux_loss)

    _replace_forward(classifier, forward)


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return a model, or the one that a PEFT model is around."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _hook_backbone(model: PreTrainedModel, packing: bool) -> Backbone:
    """Hook the backbone, in place of the hooks of an earlier call, and have it attend to documents where it packs."""
    if packing:
        set_varlen_attention(model)
    if earlier := vars(model).pop("backbone_hooks", None):
        earlier.remove()
    hooks = vars(model)["backbone_hooks"] = Backbone(model)
    return hooks


def _replace_forward(model: PreTrainedModel, forward: Callable[..., ModelOutput]) -> None:
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
    if layout.share_prefix and (found := next(find_dropout(model), None)):
        raise ValueError(
            f"share_prefix: {found[2]} is a dropout of {found[3]}, and chosen and rejected would share what it drops "
            "in their prefix. Set disable_dropout: true, or share_prefix: false."
        )
