"""perf/compare.py: its arithmetic on made-up numbers, and one case at toy size in real processes."""

import json

import compare
import numpy as np
import pytest
import rows
import torch
from compare import FOUR, THREE, TRL, TRL_NO_CHECKPOINTING, TUNEBOOK, TUNEBOOK_NO_CHECKPOINTING
from conftest import build_model
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from trl import pack_dataset


def run(seconds: list[float], memory: float, shared: int = 0) -> dict:
    """Return a run of steps of one batch of 30 and 10 tokens, as perf/measure.py writes it."""
    step = {"padded": 60, "lengths": [30, 10], "shared": [0, shared], "scored": 10}
    steps = [{"seconds": taken, **step} for taken in seconds]
    return {"seconds_to_first_step": 5.0, "peak_memory": memory, "steps": steps}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict:
    """Results of a case at toy size."""
    folder = tmp_path_factory.mktemp("perf")
    compare.main(["--quick", "--only", "dpo-shared-prompts", "--output", str(folder)])
    (results,) = folder.glob("*.json")
    assert results.with_suffix(".png").stat().st_size
    return json.loads(results.read_text())


def test_a_summary_has_medians_of_runs():
    record = {
        "case": {"task": "dpo", "selective": True},
        "matmul_rates": [1e9],
        "runs": {
            TRL: [run([seconds, seconds], 8.0) for seconds in (2, 4, 5)],
            TRL_NO_CHECKPOINTING: [run([1, 3], 16.0)],
            TUNEBOOK: [run([1, 1], 4.0, shared=8)] * 3,
            TUNEBOOK_NO_CHECKPOINTING: [run([1, 0.6], 6.0, shared=8)],
        },
    }
    summary = compare.summarize(record, compare.Size(body=100, head=10, attention=0))
    assert summary["tokens_per_second"] == dict(zip(FOUR, (10.0, 40.0, 20.0, 50.0), strict=True))
    assert (summary["speedup"], summary["speedup_without_checkpointing"]) == (4.0, 2.5)
    assert (summary["memory_ratio"], summary["memory_ratio_without_checkpointing"]) == (0.5, 0.375)
    assert summary["padding_efficiency"] == pytest.approx(40 / 60)
    assert summary["shared_tokens"] == pytest.approx(8 / 40)
    # Eight operations a parameter and token: forward, twice that in the backward, and the reference's forward
    assert summary["matmul_share"][TUNEBOOK] == pytest.approx(8 * (100 * 32 + 10 * 10) / 1e9)


def test_operations_are_those_of_a_training_step(tokenizer):
    """PyTorch's own count, which has the products of queries with the keys that they do not see, too."""
    model = build_model(len(tokenizer), num_key_value_heads=4, attn_implementation="eager")
    body = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    size = compare.Size(body=body, head=model.lm_head.weight.numel(), attention=2 * 32)
    ids = torch.randint(len(tokenizer), (1, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    unseen = 3 * 2 * size.attention * 24**2  # half of queries with keys, and of weights with values
    needed = compare.operations("sft", size, np.array([24]), np.array([0]), scored=24)
    assert needed + unseen == counter.get_total_flops()


def test_the_size_of_a_model_is_counted_without_its_embeddings(tmp_path):
    rows.save_small_model(tmp_path)
    size = compare.Size.of(tmp_path)
    layer = 4 * 320 * 320 + 3 * 320 * 896
    assert size.body == pytest.approx(6 * layer, rel=0.01)
    assert (size.head, size.attention) == (rows.VOCABULARY * 320, 6 * 320)


def test_the_page_shows_the_committed_results():
    page = compare.DOCS.read_text()
    assert "Training speed (tokens/s)" in page
    assert compare.write_tables(page, "results", compare.sheets) == page


@pytest.mark.perf
def test_both_sides_train_the_same_rows(quick):
    """Each side of a pair has the prompt and ends with EOS; the steps are those that are timed."""
    record = quick["cases"]["dpo-shared-prompts"]
    pairs = rows.shared_prompts(2 * record["case"]["steps"])
    expected = sorted(len((row["prompt"] + row[side]).split()) + 1 for row in pairs for side in ("chosen", "rejected"))
    for side in THREE:
        assert sorted(n for step in record["runs"][side][0]["steps"] for n in step["lengths"]) == expected


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_packed_rows_of_sft_fill_an_epoch_of_the_given_steps(steps, tmp_path):
    """An epoch of them then has the rows of TRL's batches."""
    rows.save_small_model(tmp_path, hidden_size=40, num_hidden_layers=1)
    drawn = rows.long_tail(8 * steps)
    length = compare.packed_length(drawn, tmp_path, steps)
    tokens = [[0] * (len((row["prompt"] + row["completion"]).split()) + 1) for row in drawn]
    assert len(pack_dataset(Dataset.from_dict({"input_ids": tokens}), length, "bfd")) == steps


@pytest.mark.perf
def test_the_ratios_are_those_of_the_raw_numbers(quick):
    runs, rates = quick["cases"]["dpo-shared-prompts"]["runs"], {}
    for side in (TRL, TUNEBOOK):
        steps = runs[side][0]["steps"]
        rates[side] = sum(sum(step["lengths"]) for step in steps) / sum(step["seconds"] for step in steps)
    summary = compare.summarize_cases(quick)["dpo-shared-prompts"]
    assert summary["speedup"] == pytest.approx(rates[TUNEBOOK] / rates[TRL])
    assert summary["memory_ratio"] == pytest.approx(runs[TUNEBOOK][0]["peak_memory"] / runs[TRL][0]["peak_memory"])


def test_generated_rows_have_the_lengths_of_gsm8k():
    """Words are tokens; the means are those of the 7,473 training rows and 1,637 pairs: 185 and 350 tokens."""
    answered, preferred = rows.gsm8k(2000), rows.gsm8k_preferences(2000)
    words = [np.mean([len(" ".join(row.values()).split()) for row in drawn]) for drawn in (answered, preferred)]
    assert words == pytest.approx([185, 350], rel=0.05)


def test_a_long_row_of_scaling_has_its_length_in_tokens(tmp_path):
    rows.save_small_model(tmp_path, hidden_size=40, num_hidden_layers=1)
    (row,) = rows.equal_lengths(1, 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 == 300
