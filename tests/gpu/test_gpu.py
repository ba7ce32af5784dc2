"""What only a GPU can show: `make gpu`, or one part of it, such as `make gpu PART=kernels`. Elsewhere it is skipped.

What is measured goes to perf/results/gpu-<device>.json, with the reasons of what was skipped.
"""

import json
import re

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    assert_same_weights,
    build_model,
    build_tokenizer,
    copy_until,
    launch_runs,
    logged,
    save_model,
    short_recipe,
    train,
)
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from tunebook.environment import Sharding
from tunebook.packing import attention
from tunebook.packing.attention import varlen_attention
from tunebook.recipe import parse
from tunebook.tools.memory import estimate
from tunebook.tools.workload import Batch, Workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
# hidden, intermediate, layers, heads, key and value heads: the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B
SHAPES = {"135M": (576, 1536, 30, 9, 3), "1B": (2048, 8192, 4, 32, 8), "8B": (4096, 14336, 2, 32, 8)}
TASKS = ["sft", "rm", "dpo"]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def results():
    """What the tests of this session measured, written when they end."""
    found: dict[str, object] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["flash-attn"] = is_flash_attn_2_available()
    yield found
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = ROOT / "perf" / "results" / f"gpu-{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | found, indent=2) + "\n")


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The folder of a random model of a size."""
    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("shapes")

    def saved(size: str):
        hidden, intermediate, layers, heads, groups = SHAPES[size]
        shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 4096}
        if not (folder / size).exists():
            save_model(folder / size, build_model(len(tokenizer), **shape), tokenizer)
        return folder / size

    return saved


# ---- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("width", [64, 72, 256, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_what_each_document_gives_on_the_cpu(dtype, width, groups, window, results):
    lengths = [3, 17, 40]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), width) for heads in (4, groups, groups)]
    rows = [torch.randn(shape) for shape in shapes]
    outputs = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        tensors = [row.to(device, kind).requires_grad_() for row in rows]
        places = {"cu_seq_lens_q": starts.to(device), "cu_seq_lens_k": starts.to(device)}
        with attention.packed_row():
            output, _ = varlen_attention(
                torch.nn.Identity(), *tensors, None, sliding_window=window, max_length_q=40, max_length_k=40, **places
            )
        gradients = torch.autograd.grad(output.float().square().sum(), tensors)
        outputs.append([x.float().cpu() for x in (output, *gradients)])
    worst = 0.0
    for ours, expected in zip(*outputs[::-1], strict=True):
        worst = max(worst, ((ours - expected).abs().max() / expected.abs().max()).item())
    results[f"kernels {dtype} {width} {groups} {window}"] = worst
    assert worst < (1e-4 if dtype == torch.float32 else 0.03)


# ---- packed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_packed_training_has_the_losses_of_padded_training(task, bf16, tiny, task_rows, tmp_path, results):
    """Of the same four rows in each step, which SFT packs into one."""
    keys = {"bf16": bf16, "max_steps": 5, "max_train_samples": 4}
    packed = {"packing": True} | ({"max_length": 256, "per_device_train_batch_size": 1} if task == "sft" else {})
    padded = train(task, tiny, task_rows, tmp_path / "padded", **keys)
    losses = logged(train(task, tiny, task_rows, tmp_path / "packed", **keys | packed), "loss")
    results[f"packed {task} {'bf16' if bf16 else 'float32'}"] = [losses, logged(padded, "loss")]
    assert losses == pytest.approx(logged(padded, "loss"), rel=1e-2 if bf16 else 1e-4)


# ---- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_with_full_determinism_a_resumed_run_is_equal_to_the_bit(task, tiny, task_rows, tmp_path):
    keys = {"bf16": True, "packing": True, "full_determinism": True, "save_strategy": "steps", "save_steps": 2}
    keys |= {"max_length": 64} if task == "sft" else {}
    train(task, tiny, task_rows, tmp_path / "whole", max_steps=4, **keys)
    copy_until(2, tmp_path / "whole", tmp_path / "parts")
    train(task, tiny, task_rows, tmp_path / "parts", max_steps=4, **keys)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


# ---- memory and speed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("task", TASKS)
def test_memory_is_what_check_says_and_mfu_is_logged(task, size, shaped, task_rows, tmp_path, results):
    model = shaped(size)
    keys = {"bf16": True, "max_steps": 6, "per_device_train_batch_size": 8, "activation_checkpointing": True}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = train(task, model, task_rows, tmp_path / "o", **keys)
    measured = torch.cuda.max_memory_allocated()
    recipe = parse(task, short_recipe(model, task_rows, tmp_path / "o", **keys))
    rows = 8 if task == "sft" else 16
    workload = Workload.from_recipe(
        recipe, trainer.model.config, Batch(rows, 32, rows * 32), Sharding("none", 1, 0), "cuda", False
    )
    expected = sum(part.bytes for part in estimate(workload) if part.name != "process")
    speeds = {name: logged(trainer, name)[-1:] for name in ("tokens_per_second", "mfu")}
    results[f"memory {task} {size}"] = {"measured": measured, "check": expected, **speeds}
    assert 0.6 < expected / measured < 1.6


# ---- two devices -------------------------------------------------------------------------------------------------


@two_devices
@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_two_devices_train_what_one_does(config, tiny, sft_rows, pair_rows, tmp_path, results):
    keys = {"max_steps": 4, "global_batch_size": 8, "per_device_train_batch_size": 4, "bf16": False}
    rows = {"sft": sft_rows, "rm": pair_rows, "dpo": pair_rows}
    launch_runs([(t, short_recipe(tiny, rows[t], tmp_path / t, **keys)) for t in TASKS], config=config, processes=2)
    for task in TASKS:
        one = train(task, tiny, rows[task], tmp_path / f"{task} on one", **keys)
        log = json.loads((tmp_path / task / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        results[f"{config} {task}"] = [losses, logged(one, "loss")]
        assert losses == pytest.approx(logged(one, "loss"), rel=1e-3)
        assert load_file(tmp_path / task / "model.safetensors").keys()
