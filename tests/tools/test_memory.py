"""The estimate of a step's memory: against hand arithmetic, against the real allocations, and against measured runs."""

import json
import re
from dataclasses import replace

import memory
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from tunebook.environment import Sharding
from tunebook.tools.memory import LiveBytes, count_step, estimate
from tunebook.tools.workload import Batch, Workload

SIZES = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, intermediate_size=176, num_hidden_layers=3)
MATRICES = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
PARAMETERS = 2 * 512 * 64 + MATRICES + 3 * 2 * 64 + 64
LORA = LoraConfig(r=8, task_type="CAUSAL_LM")
BATCH = Batch(rows=2, length=128, scored=100)


def parts(*args, config=CONFIG, batch=BATCH, task="sft", **kwargs) -> dict[str, float]:
    return {part.name: part.bytes for part in estimate(Workload(config, task, batch, *args, **kwargs))}


def test_live_bytes_counts_what_lives_at_a_time():
    x = torch.empty(100, device="meta")
    with LiveBytes([x]) as count:
        y = x * 2
        z = y + 1
        del y
        z.view(10, 10)
        assert count.live == 400
        w = z * 3
        assert count.live == 800
    del w
    assert count.peak == 800


def test_weights_gradients_and_adam_are_16_bytes_a_parameter_in_float32():
    found = parts(device="cpu")
    assert (found["weights"], found["gradients"], found["optimizer"]) == tuple(n * PARAMETERS for n in (4, 4, 8))


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (2, 2, 12)), (1, (2, 2, 1.5)), (2, (2, 0.25, 1.5)), (3, (0.25, 0.25, 1.5))]
)
def test_zero_shards_as_the_paper_says(stage, expected):
    """Rajbhandari et al., figure 1: 2 + 2 + 12 bytes per parameter; each stage divides one more by the devices."""
    found = parts(Sharding("deepspeed", 8, stage), mixed=True)
    assert tuple(found[name] / PARAMETERS for name in ("weights", "gradients", "optimizer")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("optim", "size"),
    [("adamw_torch_fused", 8), ("adamw_8bit", 2), ("lion_32bit", 4), ("lion_8bit", 1), ("muon", 4), ("adafactor", 0)],
)
def test_an_optimizer_keeps_its_states(optim, size):
    """An 8-bit state is one byte, whatever the dtype of the weights; DeepSpeed adds the parameter in float32."""
    workload = Workload(CONFIG, "sft", BATCH, optim=optim)
    assert workload.state_size == size
    assert replace(workload, sharding=Sharding("deepspeed"), mixed=True).state_size == 4 + size
    assert replace(workload, dtype="bfloat16").state_size == (size if "8bit" in optim else size / 2)


def test_offloaded_parts_are_not_on_the_device():
    found = parts(Sharding("deepspeed", 8, 3, offload_optimizer=True, offload_weights=True), mixed=True)
    assert found["weights"] == found["optimizer"] == 0


def test_only_the_adapter_has_gradients():
    trained, total = get_peft_model(LlamaForCausalLM(CONFIG), LORA).get_nb_trainable_parameters()
    found = parts(peft_config=LORA)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * total, 4 * trained, 8 * trained)


def test_quantized_matrices_take_their_bits():
    saved = parts(peft_config=LORA)["weights"] - parts(peft_config=LORA, bits=4)["weights"]
    assert saved == pytest.approx(MATRICES * (4 - 0.5 - 4 / 64))


def test_a_reference_is_a_second_model_unless_it_is_offloaded():
    found = parts(task="dpo", reference=CONFIG)
    assert found["reference"] == 4 * PARAMETERS
    assert parts(task="dpo", reference=CONFIG, ref_offload=True)["reference"] < found["reference"]


def test_the_count_on_meta_is_what_a_real_step_allocates():
    """The same model with real tensors and torch's own attention, unpadded; its storages are counted as they come."""
    workload = Workload(CONFIG, "rm", Batch(1, 512, 1, packed=True), device="cpu", activation_checkpointing=False)
    model = replace(workload).model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    with LiveBytes([*model.parameters(), *model.buffers()]) as count:
        hidden = model.base_model(input_ids=torch.ones(1, 512, dtype=torch.long), use_cache=False).last_hidden_state
        model.score(hidden[:, -1:].flatten(0, 1)).sum().backward()
        del hidden
    assert count_step(workload) == pytest.approx(count.peak, rel=0.05)


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing():
    one, two = (parts(batch=Batch(1, length, packed=True))["activations"] for length in (4096, 8192))
    assert two == pytest.approx(2 * one, rel=0.1)
    assert parts(batch=Batch(1, 8192, packed=True), activation_checkpointing=False)["activations"] > 1.5 * two


def test_accumulated_gradients_are_there_when_a_batch_begins():
    kwargs = {"batch": Batch(1, 4, 4), "device": "cpu", "activation_checkpointing": False}
    once, accumulated = (parts(**kwargs, accumulates=accumulates)["activations"] for accumulates in (False, True))
    assert accumulated > once


def test_a_mixture_of_experts_is_counted():
    config = MixtralConfig(**SIZES, intermediate_size=128, num_hidden_layers=2)
    assert parts(config=config, mixed=True)["activations"] > 0


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "billions"),
    [(4096, 14336, 32, 32, 8.03), (8192, 28672, 80, 64, 70.55)],  # as their model cards say
    ids=["8B", "70B"],
)
def test_large_models_need_only_their_config(hidden, intermediate, layers, heads, billions):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8, **sizes)
    found = parts(Sharding("deepspeed", 64, 3), config=config, batch=Batch(1, 4096, 4096, packed=True), mixed=True)
    assert found["weights"] * 64 / 2 / 1e9 == pytest.approx(billions, rel=0.01)


# ---- Measured runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheets() -> dict:
    return {
        path.stem: memory.sheet(json.loads(path.read_text())) for path in sorted(memory.RESULTS.glob("memory-*.json"))
    }


def test_the_estimate_is_within_15_percent_of_every_measured_run(sheets):
    assert sheets
    for name, sheet in sheets.items():
        assert len(sheet.rows) == len(list(memory.cases()))
        for row in sheet.rows:
            assert abs(int(row[4].rstrip("%"))) <= 15, (name, row)


def test_the_table_in_the_docs_is_that_of_the_results(sheets):
    text = memory.DOCS.read_text()
    assert re.findall(r"<!-- memory: (\S+) -->", text) == list(sheets)
    assert all(sheet.markdown() in text for sheet in sheets.values())
