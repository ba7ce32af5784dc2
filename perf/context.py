"""Measure peak memory and time of a step on a long row by context_parallel_size, on the CPU.

python perf/context.py        write perf/results/context-<machine>.json and print the table of docs/performance.md

The memory is all that forward and backward add to a process: activations, the exchanged keys and values, and logits.
Every run starts new processes. They return freed memory at once (M_MMAP_THRESHOLD), so the peak holds only what was
needed.
"""

import argparse
import ctypes
import itertools
import json
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import rows
import torch
import torch.distributed as dist
from compare import PACKAGES, RESULTS, Sheet, describe_machine
from measure import RSS_UNIT
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tunebook.packing.context_parallel import ContextGroup
from tunebook.packing.forward import pack_causal_lm

M_MMAP_THRESHOLD = -3  # malloc.h


def step(model: torch.nn.Module, tokens: int) -> float:
    """Return the seconds of forward and backward on one document with a label at each token."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    start = time.perf_counter()
    model(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True
    ).log_probs.mean().backward()
    return time.perf_counter() - start


def measure(rank: int, folder: Path, case: dict) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    size = case["context_parallel_size"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "model", dtype=torch.float32).train()
    add_fused_lm_head(model)
    context = ContextGroup(dist.group.WORLD, case["context_parallel_head_stride"]) if size > 1 else None
    pack_causal_lm(model, context=context)
    if case["activation_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, 64)  # allocates the gradients
    before = psutil.Process().memory_info().rss
    seconds = [step(model, case["tokens"]) for _ in range(case["steps"])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    result = {"memory": peak - before, "seconds": median(seconds)}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run(case: dict, folder: Path) -> dict:
    size = case["context_parallel_size"]
    folder = Path(tempfile.mkdtemp(dir=folder))
    torch.multiprocessing.start_processes(measure, (folder, case), nprocs=size, start_method="spawn")
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return {**case, "ranks": ranks}


def sheet(runs: list[dict]) -> Sheet:
    lines = [
        (
            "on" if run["activation_checkpointing"] else "off",
            str(run["context_parallel_size"]),
            str(run["context_parallel_head_stride"]) if run["context_parallel_size"] > 1 else "",
            f"{max(rank['memory'] for rank in run['ranks']) / 1e6:,.0f}",
            f"{max(rank['seconds'] for rank in run['ranks']):.1f}",
        )
        for run in runs
    ]
    header = ("checkpointing", "context_parallel_size", "head stride", "MB per process", "seconds per step")
    return Sheet(f"One document of {runs[0]['tokens']:,} tokens", header, lines)


def main(sizes: list[int], strides: list[int], tokens: int, steps: int) -> None:
    console, runs = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        rows.save_small_model(Path(folder) / "model")
        for checkpointing, size, stride in itertools.product((True, False), sizes, strides):
            if size == 1 and stride != strides[0]:
                continue
            case = {"context_parallel_size": size, "context_parallel_head_stride": stride, "tokens": tokens}
            runs.append(run(case | {"activation_checkpointing": checkpointing, "steps": steps}, Path(folder)))
            console.print(runs[-1])
    machine = describe_machine()
    result = {"machine": machine, "packages": {package: version(package) for package in PACKAGES}, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"context-{machine['name']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(sheet(runs).table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    main(**vars(parser.parse_args()))
