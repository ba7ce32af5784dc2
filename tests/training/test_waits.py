"""A micro-batch in training does not wait for the GPU on our account, as far as a CPU can show it.

Each operation whose result Python must read, or whose shape follows from values, is counted by the function that asks
for it.
"""

import traceback
from collections import Counter

import pytest
import torch
import transformers
from conftest import train
from torch.utils._python_dispatch import TorchDispatchMode

from tunebook.packing import attention
from tunebook.training import collators

READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")
MASKED = ("aten.index.Tensor", "aten.index_put", "aten._index_put")
# A mask is a number on the CPU (make_mask), and on a CPU each document is attended to on its own, by its place
ON_THE_CPU = {"_read_window", "_document_attention"}
CASES = [("sft", {}), ("sft", {"packing": True, "max_length": 64}), ("rm", {}), ("rm", {"packing": True}), ("dpo", {})]
CASES += [("dpo", {"packing": True, "share_prefix": share}) for share in (False, True)]
CASES += [("dpo", {"packing": True, "nll_loss_coef": 0.1})]


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, by the function of ours that asks for it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        masked = name.startswith(MASKED) and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name.startswith(READS):
            frames = [frame for frame in traceback.extract_stack() if "site-packages/torch/" not in frame.filename]
            ours = [frame.name for frame in frames if "/src/tunebook/" in frame.filename]
            if "/src/tunebook/" in frames[-2].filename and not ON_THE_CPU & {*ours}:
                self.counts[frames[-2].name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch) -> list[Counter]:
    """What each micro-batch waited for."""
    step, counted = transformers.Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        with Waits() as mode:
            loss = step(self, *args, **kwargs)
        counted.append(mode.counts)
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    return counted


@pytest.mark.parametrize(("task", "keys"), CASES, ids=str)
def test_no_line_of_ours_waits_in_a_micro_batch(task, keys, tiny, task_rows, tmp_path, waits):
    train(task, tiny, task_rows, tmp_path / "o", max_steps=2, **keys)
    assert len(waits) == 2 and waits[1] == Counter()


def test_a_batch_that_is_laid_out_in_the_forward_would_wait(tiny, pair_rows, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(collators.LayoutCollator, "__call__", lambda self, examples: self.collate(examples))
    train("dpo", tiny, pair_rows, tmp_path / "o", max_steps=2, packing=True)
    assert waits[1]["pack_rows"] == 10 and waits[1]["find_scored"] == 2  # of policy and reference


def test_the_mask_of_a_packed_row_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(attention._row, "packed", True)
    with torch.device("meta"):
        assert attention.make_mask().device.type == "cpu"
