"""Batches as TRL collates them, with what we add to them before they leave the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from ..packing.context_parallel import LaidOut
from ..packing.forward import find_scored, pack_rows


@dataclass
class LayoutCollator:
    """Collate as another collator does, and lay the batch out while it is on the CPU: a packed forward that
    does so itself waits for the GPU.

    Args:
        packing, share_prefix: as of `pack_causal_lm` and `pack_reward_model`.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    packing: bool
    share_prefix: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch, laid_out = self.collate(examples), LaidOut()
        labelled = batch["labels"] != -100 if "labels" in batch else batch.get("completion_mask")
        if labelled is not None:
            laid_out["scored"] = find_scored(labelled)
        if self.packing and "cu_seq_lens_q" not in batch:
            laid_out["row"], laid_out["source"] = pack_rows(
                batch["input_ids"], batch["attention_mask"], self.share_prefix
            )
        return batch | {"laid_out": laid_out}


@dataclass
class SubsetCollator(DataCollatorForPreference):
    """Collate as TRL does, and keep the number of each pair's subset."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "subset" in examples[0]:
            batch["subset"] = torch.tensor([example["subset"] for example in examples])
        return batch
