"""Context parallelism: the ranks of a group share one packed row, and with it the memory of its activations.

A rank runs the backbone and the LM head on its own tokens only. Keys and values are gathered over the group, some heads
at a time, as in Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2); what the head gives for each token is added
up at the end, so that every rank of a group has all of it and the trainers' losses and metrics stay as they are.

The backward of both exchanges sums the gradients of the group's ranks, each of which has the whole loss. A parameter's
gradient, averaged over all ranks as in DDP, ZeRO and FSDP, is then its gradient averaged over the groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from ..recipe.configs import RunConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.base_trainer import _BaseTrainer

    class TRLTrainer(_BaseTrainer):
        """What a mixin before one of TRL's trainers can rely on."""

        args: RunConfig
        model: PreTrainedModel | PeftModel
        train_dataset: Dataset
        eval_dataset: Dataset
        processing_class: PreTrainedTokenizerBase
        _total_train_tokens: int
else:
    TRLTrainer = object  # so that the mixin's methods come before those of any trainer


class LaidOut(TypedDict, total=False):
    """What a collator knows of a batch on the CPU, where no value has to be waited for."""

    scored: torch.Tensor  # (N,), the places of the scored tokens in the flattened batch
    row: "Batch"  # the batch as a packed row, with the source of each of its tokens; see `pack_rows`
    source: torch.Tensor


class Batch(TypedDict, total=False):
    """The arguments of a forward: a padded batch, (B, L), or the packed row of one, as `varlen_attention` takes it."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    key_index: torch.Tensor | None  # a row of a batch without a shared prefix has none
    context: "ContextGroup"
    counted: torch.Tensor | None
    laid_out: "LaidOut"
    output_router_logits: bool | None
    num_items_in_batch: torch.Tensor | int | None


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share a packed row.

    Of 2C chunks of equal length, rank r of C has chunks r and 2C-1-r, and so the same share of the causal attention as
    any other. A document of its own fills the row up to a multiple of 2C tokens.

    Args:
        head_stride: key and value heads that are gathered at a time; None for all.
    """

    group: ProcessGroup
    head_stride: int | None = None

    def split(self, row: Batch) -> tuple[Batch, torch.Tensor]:
        """Return this rank's part of a packed row.

        Args:
            row: input_ids and position_ids (1, T), and the documents as `varlen_attention` takes them.

        Returns:
            The same for this rank's tokens. A document here is a piece of one that lies in one chunk; its keys, in the
            gathered tokens, are the document's up to the piece's last token.
            place: (T,), where each token of the row is in the gathered tokens.
        """
        size, rank = self.group.size(), self.group.rank()
        ids, positions = row["input_ids"], row["position_ids"]
        tokens, device = ids.shape[1], ids.device
        width = -(-tokens // (2 * size))
        fill = 2 * size * width - tokens
        token = torch.arange(tokens + fill, device=device)
        chunk = token // width
        holder = chunk.minimum(2 * size - 1 - chunk)
        place = (2 * holder + (chunk >= size)) * width + token % width

        start_q, start_k = (
            torch.cat([row[name], row[name][-1:] + fill]).long() for name in ("cu_seq_lens_q", "cu_seq_lens_k")
        )
        first = torch.tensor([[rank], [2 * size - 1 - rank]], device=device) * width
        end = start_q[1:].minimum(first + width)
        queries = end - start_q[:-1].maximum(first)
        keys = start_k.diff() - (start_q[1:] - end)
        piece = queries > 0
        queries, keys, start = queries[piece], keys[piece], start_k[:-1].expand_as(piece)[piece]
        end_k = keys.cumsum(0)
        key_index = torch.arange(int(end_k[-1]), device=device) + (start - end_k + keys).repeat_interleave(keys)
        if (shared := row.get("key_index")) is not None:
            key_index = torch.cat([shared, token[tokens:]])[key_index]
        own = (first + token[:width]).flatten()
        part: Batch = {
            "input_ids": F.pad(ids, (0, fill))[:, own],
            "position_ids": torch.cat([positions, token[None, :fill]], dim=1)[:, own],
            "cu_seq_lens_q": F.pad(queries.cumsum(0), (1, 0)).int(),
            "cu_seq_lens_k": F.pad(end_k, (1, 0)).int(),
            "max_length_q": int(queries.max()),
            "max_length_k": int(keys.max()),
            "key_index": place[key_index],
            "context": self,
        }
        return part, place[:tokens]

    def take_share(self, row: Batch, positions: torch.Tensor) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """Return this rank's part of a packed row, as the backbone's arguments; its part of the tokens at `positions`,
        (N,), as positions in it; and which of them these are, (N,)."""
        part, place = self.split(row)
        counted = place if row.get("key_index") is None else place[row["key_index"]]
        where, width = place[positions], part["input_ids"].shape[1]
        mine = where // width == self.group.rank()
        return {**row, **part, "counted": counted}, where[mine] % width, mine

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens of all ranks, one after the other, (C * tokens, ...), from each rank's (tokens, ...)."""
        return collectives.wait_tensor(collectives.all_gather_single(x.contiguous(), 0, self.group))

    def combine(self, x: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """Return (N, ...), from every rank's rows of it: `x` are those where `mine`, (N,), is true."""
        rows = torch.zeros(len(mine), *x.shape[1:], device=x.device).index_put((mine,), x.float())
        return collectives.wait_tensor(collectives.all_reduce(rows, "sum", self.group)).to(x.dtype)

    def attend(
        self,
        attend: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what `attend` gives for the keys and values of all ranks; shapes as in `varlen_attention`."""

        def attend_to_all(query: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
            key, value = (self.gather(x[0].transpose(0, 1))[key_index].transpose(0, 1)[None] for x in own)
            return attend(query, key, value)

        stride, groups = self.head_stride or key.shape[1], query.shape[1] // key.shape[1]
        if stride >= key.shape[1]:
            return attend_to_all(query, key, value)
        heads = zip(query.split(stride * groups, 1), key.split(stride, 1), value.split(stride, 1), strict=True)
        # What was gathered would be kept for the backward, of all heads; it is gathered again instead
        again = partial(checkpoint, attend_to_all, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*x) for x in heads], dim=2)


def build_context_group(accelerator: Accelerator, size: int, head_stride: int | None) -> ContextGroup:
    """Make groups of `size` neighbouring ranks, which `accelerator` gives the same batches and counts once when it
    gathers."""
    # PATCH(accelerate<1.16): accelerate builds a mesh for its own kinds of parallelism only, each with one strategy,
    # though its data loaders take any, under DeepSpeed by the name tp. Waits for accelerate/accelerator.py:2620. Delete
    # when the mesh is an argument.
    shape = (accelerator.num_processes // size, size)
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp_replicate", "tp"))
    gather = accelerator.gather

    def gather_batches(data: object) -> object:
        return recursively_apply(lambda x: x.unflatten(0, (*shape, -1))[:, 0].flatten(0, 1), gather(data))

    accelerator._prepare_device_mesh = lambda: mesh
    accelerator.gather = gather_batches
    return ContextGroup(mesh["tp"].get_group(), head_stride)


class ContextParallelMixin(TRLTrainer):
    """Mixin before a TRL trainer: `context_parallel_size` ranks share each batch."""

    context: ContextGroup | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.context_parallel_size > 1:
            self.context = build_context_group(
                self.accelerator, self.args.context_parallel_size, self.args.context_parallel_head_stride
            )

    def get_tp_size(self) -> int:
        """Return how many ranks have the same batch, which transformers asks by this name."""
        return super().get_tp_size() * self.args.context_parallel_size

    def _get_num_items_in_batch(self, *args: object) -> torch.Tensor | int | None:
        # PATCH(transformers<5.25): the Trainer gathers the number from all ranks and divides it by `get_tp_size()`, but
        # here it is gathered once per group. Waits for transformers/trainer.py:2306. Delete when ranks that share a
        # batch are counted once.
        items = super()._get_num_items_in_batch(*args)  # type: ignore[arg-type]
        return items if items is None else items * self.args.context_parallel_size
