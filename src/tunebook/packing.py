"""Packing in the model's forward: TRL's collators, trainers, losses, metrics and reference pass stay as they are.

The patched forward takes TRL's padded batch, runs the backbone over one packed row without the padding (and, where
chosen and rejected share a prompt, with it once), scores the labelled positions and puts the results where TRL
expects them.
"""

import functools
import types
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import trl.trainer.utils
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from .attention import set_varlen_attention

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
    model: nn.Module, packing: bool = True, share_prefix: bool = False, truncation_mode: str = "keep_start"
) -> None:
    """
    Patch the forward of a causal LM that `trl.trainer.utils.add_fused_lm_head` has patched: with `fused_lm_head=True`
    it scores the labelled positions only, on every device, and returns what it returned before. All other calls
    (generation, logits) are the model's own.

    Args:
        model: a causal LM, or a PEFT model around one; policy or reference.
        packing: drop the padding; a batch that the collator has packed (`cu_seq_lens_q`) needs no flash-attn.
        share_prefix: the batch is pairs, chosen first (DPO); see `pack_rows`.
        truncation_mode: the collator's.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    if packing:
        _set_packing(model, share_prefix, truncation_mode)
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
        output = fused_forward(
            *args,
            fused_lm_head=True,
            shift_labels=labels[:, 1:][label_mask][None],
            positions=source[:, :-1][label_mask],
            **kwargs,
        )
        label_mask = label_mask.to(output.log_probs.device)
        fields = {name: output[name] for name in PER_TOKEN_FIELDS if name in output}
        # masked_scatter keeps a batch without labels connected to the model, as TRL does
        fields = {name: x.new_zeros(label_mask.shape).masked_scatter(label_mask, x) for name, x in fields.items()}
        return FusedCausalLMOutput(loss=output.loss, label_mask=label_mask, aux_loss=output.aux_loss, **fields)

    model.forward = types.MethodType(forward, model)
    trl.trainer.utils._ChunkedLogProbFunction = LogProbs


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """`logits` (B, num_labels), and the load-balancing loss of an MoE when called with `output_router_logits=True`."""

    aux_loss: torch.Tensor | None = None


def pack_reward_model(model: nn.Module, packing: bool = True, share_prefix: bool = False) -> None:
    """
    Patch the forward of a sequence classifier: it reads the reward at the last token of each row by the attention
    mask, whatever the pad token is, with the model's head, whatever its name, and returns a `RewardOutput`.

    Args:
        model: a sequence classifier, or a PEFT model around one.
        packing: drop the padding.
        share_prefix: the batch is pairs, chosen first; see `pack_rows`.

    Raises:
        ValueError: the model or the settings do not allow it.
    """
    if packing:
        _set_packing(model, share_prefix, "keep_start")
    model = model.get_base_model() if is_peft_model(model) else model
    model.base_model.register_forward_hook(_select_positions, with_kwargs=True)
    (head,) = (name for name, module in model.named_children() if module is not model.base_model)

    @functools.wraps(type(model).forward)
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
        outputs = self.base_model(positions=positions, **kwargs)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            config = self.config
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
            )
        # The head is looked up on each call: PEFT and FSDP replace it
        logits = self.get_submodule(head)(outputs.last_hidden_state[0])
        return RewardOutput(logits=logits, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


def _set_packing(model: nn.Module, share_prefix: bool, truncation_mode: str) -> None:
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
    if share_prefix:
        if truncation_mode == "keep_end":
            raise ValueError("share_prefix: truncation_mode: keep_end cuts the shared prefix. Set it to keep_start.")
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
        if kwargs.get("key_index") is not None and "router_logits" in outputs:
            # A shared token counts for both of its documents in the load-balancing loss
            outputs.router_logits = tuple(logits[kwargs["key_index"]] for logits in outputs.router_logits)
    return outputs


class LogProbs:
    """
    Takes the place of TRL's `ChunkedLogProbFunction` in `add_fused_lm_head`, which has no argument for it (TRL 1.16).
    On a CPU TRL's makes a dozen passes over the logits, and computes them twice. Delete this when it no longer does.
    """

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs):
        if (
            hidden.device.type == "cpu"
            and hidden.dtype == torch.float32 == weight.dtype
            and not (final_logit_softcapping or bias is not None or torch.is_autocast_enabled("cpu"))
        ):
            # needs_input_grad is true of a parameter under no_grad, too, and the logits would be kept for nothing
            weight = weight if torch.is_grad_enabled() else weight.detach()
            return _LinearLogProbs.apply(hidden * (logit_scale / temperature), weight, targets, outputs)
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )


class _LinearLogProbs(torch.autograd.Function):
    """
    The fields of `FusedCausalLMOutput` for the logits `hidden @ weight.T`, (N, H) and (V, H). It makes the three
    products that forward and backward need, and two passes over the logits, which become the probabilities p in
    place:

        d log p[target] / d hidden = weight[target] - p @ weight
        entropy = log Z - p @ logits = log Z - (p @ weight) * hidden        (without gradient)
    """

    CHUNK_LOGITS = 2**24  # 64 MiB
    KEPT_LOGITS = 2**28  # 1 GiB: more are computed again in the backward

    @staticmethod
    def forward(ctx, hidden, weight, targets, outputs):
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
        entropy = log_z - (expected * hidden).sum(-1) if "entropy" in outputs else None
        log_sum_sq_probs = sum_sq_probs.log() if "log_sum_sq_probs" in outputs else None
        mean_logits = hidden @ weight.mean(dim=0) if "mean_logits" in outputs else None
        is_top1 = is_top1 if "is_top1" in outputs else None
        ctx.mark_non_differentiable(*(x for x in (entropy, log_sum_sq_probs, mean_logits, is_top1) if x is not None))
        ctx.set_materialize_grads(False)
        direction = weight[targets] - expected if needs_hidden else None
        ctx.save_for_backward(hidden, weight, targets, direction, buffer if keep else None)
        return log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad, *_):
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


def pair_lengths(dataset: Dataset, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens of each pair, chosen and rejected together, and how many of them `share_prefix` saves: two arrays of
    (rows,). The packed length of a pair is the first less, where the prefix is shared, the second.

    Args:
        dataset: TRL's processed columns, chosen_ids and rejected_ids (RM), and prompt_ids (DPO).
        max_length: where the collator cuts each side (truncation_mode: keep_start).
    """
    columns = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    tokens, saved = [], []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        prompt = np.diff(_offsets(table["prompt_ids"])[1]) if "prompt_ids" in columns else 0
        sides = [_offsets(table[name]) for name in ("chosen_ids", "rejected_ids")]
        lengths = [np.diff(offsets) for _, offsets in sides]
        shared = np.minimum(*lengths)
        row = np.repeat(np.arange(len(shared)), shared)
        column = np.arange(len(row)) - (shared.cumsum() - shared)[row]
        chosen, rejected = (values[offsets[row] + column] for values, offsets in sides)
        differ = chosen != rejected
        np.minimum.at(shared, row[differ], column[differ])
        cut = np.iinfo(np.int64).max if max_length is None else max_length
        chosen, rejected, shared = (np.minimum(prompt + length, cut) for length in (*lengths, shared))
        tokens.append(chosen + rejected)
        saved.append(np.minimum(shared, rejected - 1))
    return np.concatenate(tokens), np.concatenate(saved)


def _offsets(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists, one list after the other, and the (rows + 1,) places where the lists start."""
    lengths = pc.list_value_length(column).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.concatenate(([0], lengths.cumsum()))


class TokenBatchSampler(BatchRebalanceSampler):
    """
    Batches with an even number of packed tokens, for one rank. The batches of an epoch are a function of the seed and
    of the epoch, and as many in every epoch, so that skipping the first of them resumes it.

    A subclass of transformers' `BatchRebalanceSampler`, so that `Trainer._get_train_sampler` may return it in place
    of a sampler. That one counts padded tokens and gives the ranks different numbers of rows, which TRL's metrics
    cannot gather.

    Every row is seen once an epoch. Where the last batches cannot have the same number of rows on each rank, they are
    completed with up to world_size - 1 rows from the epoch's beginning, as accelerate does, or left out (`drop_last`).

    With `rows_per_batch`, each epoch is shuffled and cut into windows of some optimizer steps; a window is dealt into
    steps and a step into batches of nearly equal tokens. Which rows a step has depends on its number of rows only,
    not on how they are split over ranks and accumulation. With `max_tokens`, a batch has as many rows as fit, the
    same number on every rank; the batches are formed once, as TRL's packing forms its rows, and each epoch shuffles
    them. A loss that is a mean over the batch (RM, DPO) then gives more weight to a row of a batch with fewer rows.

    Args:
        lengths: (rows,) packed tokens of each row or pair.
        rows_per_batch: rows in a batch.
        max_tokens: the most packed tokens in a batch, in place of rows_per_batch.
        gradient_accumulation_steps: batches that a rank has in an optimizer step.
        seed, rank, world_size: the same seed on all ranks.
        window: optimizer steps that are balanced with one another.

    Raises:
        ValueError: a row is longer than max_tokens.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        rows_per_batch: int | None = None,
        max_tokens: int | None = None,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        window: int = 16,
    ):
        assert (rows_per_batch is None) != (max_tokens is None)
        if max_tokens is not None and lengths.max() > max_tokens:
            raise ValueError(
                f"max_tokens_per_batch is {max_tokens}, but the longest row has {lengths.max()} packed tokens. "
                f"Set it to {lengths.max()} or more, or lower max_length."
            )
        self.lengths, self.rows_per_batch, self.max_tokens = lengths, rows_per_batch, max_tokens
        self.gradient_accumulation_steps, self.window = gradient_accumulation_steps, window
        self.seed, self.rank, self.world_size, self.drop_last = seed, rank, world_size, drop_last
        self.epoch = 0  # BatchRebalanceSampler.set_epoch
        self.filled = None if max_tokens is None else self._fill(np.random.default_rng(seed))

    def __len__(self) -> int:
        if self.filled is not None:
            return len(self.filled)
        rows = self.rows_per_batch * self.world_size
        return len(self.lengths) // rows if self.drop_last else -(-len(self.lengths) // rows)

    def __iter__(self):
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.filled is None:
            batches = self._balance(generator)
        else:
            batches = (self.filled[i] for i in generator.permutation(len(self.filled)))
        for of_ranks in batches:
            yield of_ranks[self.rank].tolist()

    def _balance(self, generator: np.random.Generator):
        """Yield the batches of all ranks, (world_size, rows) each."""
        order = generator.permutation(len(self.lengths))
        rows_of_ranks = self.rows_per_batch * self.world_size
        rows_of_step = rows_of_ranks * self.gradient_accumulation_steps
        for window in np.split(order, range(self.window * rows_of_step, len(order), self.window * rows_of_step)):
            whole = len(window) // rows_of_step * rows_of_step
            steps = generator.permutation(self._deal(window[:whole], whole // rows_of_step))
            for step in (*steps, window[whole:]):
                whole = len(step) // rows_of_ranks * rows_of_ranks
                batches = self._deal(step[:whole], whole // self.rows_per_batch)
                yield from batches.reshape(-1, self.world_size, self.rows_per_batch)
                if (rest := len(step) - whole) and not self.drop_last:
                    completed = np.append(step[whole:], np.resize(order, -rest % self.world_size))
                    yield self._deal(completed, self.world_size)

    def _fill(self, generator: np.random.Generator) -> list[np.ndarray]:
        """The batches of all ranks, (world_size, rows) each, none with more than max_tokens."""
        order = generator.permutation(len(self.lengths))
        if rest := len(order) % self.world_size:
            order = order[:-rest] if self.drop_last else np.append(order, np.resize(order, self.world_size - rest))
        total = self.lengths[order].cumsum()
        filled, start = [], 0
        while start < len(order):
            before = total[start] - self.lengths[order[start]]
            end = np.searchsorted(total, before + self.max_tokens * self.world_size, side="right")
            for rows in range((end - start) // self.world_size, 0, -1):
                batches = self._deal(order[start : start + rows * self.world_size], self.world_size)
                if self.lengths[batches].sum(axis=1).max() <= self.max_tokens:
                    break
            filled.append(batches)
            start += batches.size
        return filled

    def _deal(self, rows: np.ndarray, groups: int) -> np.ndarray:
        """(groups, rows / groups): round by round, the longest row left goes to the group with the fewest tokens."""
        longest_first = rows[np.argsort(-self.lengths[rows], kind="stable")]
        dealt = longest_first.reshape(len(rows) // max(groups, 1), groups)
        tokens = np.zeros(groups, dtype=np.int64)
        for i, rows in enumerate(dealt):
            group = np.argsort(tokens, kind="stable")
            dealt[i, group] = rows.copy()
            tokens[group] += self.lengths[dealt[i, group]]
        return dealt.T
