"""Ranks that share packed rows compute what one process computes: log-probs, gradients, trainers' logs and weights."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import launch_runs, short_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_packing import FIELDS, assert_same_gradients, assert_same_logs, batches, build, collate, gradients_of

import tunebook.recipe.configs
from tunebook import run_script
from tunebook.errors import RecipeError
from tunebook.packing.context_parallel import ContextGroup
from tunebook.packing.forward import pack_causal_lm, pack_reward_model, pack_rows
from tunebook.recipe import TASKS, parse
from tunebook.training.run import prepare

SIZES = (2, 4)
MODELS = ("Llama", "Mistral with a window", "Gemma 2, soft-capped", "Qwen3 MoE")
LONG = ([1 + i % 5 for i in range(30)], [7] * 9 + [3] * 4, [7] * 9)  # over several chunks, and alike beyond the prompt
ROWS = [([1, 2, 3], [4, 5, 6, 7], [4, 8]), ([3, 1], [5, 2, 2], [7, 7, 4, 1]), ([6], [8, 8], [8, 8]), LONG]


# What a rank has


def split(batch, share_prefix: bool, size: int):
    """The packed row, and the part and the places of each rank of `size`."""
    row, _ = pack_rows(batch["input_ids"], batch["attention_mask"], share_prefix)
    groups = [SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank) for rank in range(size)]
    return row, [ContextGroup(group).split(row) for group in groups]


def keys_of_queries(row, names) -> list[list]:
    """What each token of a row, or of a rank's part, attends to, by the `names` of the tokens that may be keys."""
    ends = [row[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    names = names if row["key_index"] is None else [names[i] for i in row["key_index"].tolist()]
    seen = []
    for q, q_end, k, k_end in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert q_end - q <= row["max_length_q"] and k_end - k <= row["max_length_k"]
        seen += [names[k : k_end - (q_end - 1 - query)] for query in range(q, q_end)]
    return seen


@settings(deadline=None)
@given(rows=batches, share_prefix=st.booleans(), size=st.integers(1, 5))
def test_every_token_is_on_one_rank_and_attends_to_what_it_attends_to_in_the_row(rows, share_prefix, size):
    row, parts = split(collate(rows), share_prefix, size)
    place = parts[0][1]
    gathered = {name: torch.cat([part[name] for part, _ in parts], dim=1) for name in ("input_ids", "position_ids")}
    assert len(place.unique()) == row["input_ids"].shape[1]
    for name, tokens in gathered.items():
        assert torch.equal(tokens[:, place], row[name])
    tokens = ["filler"] * gathered["input_ids"].shape[1]
    for token, where in enumerate(place.tolist()):
        tokens[where] = token
    seen = [keys for part, _ in parts for keys in keys_of_queries(part, tokens)]
    assert [seen[where] for where in place.tolist()] == keys_of_queries(row, list(range(len(place))))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_work(size):
    batch = collate([([1] * 100, [2] * 28, [3] * 128)])
    _, parts = split({name: x[:1] for name, x in batch.items()}, False, size)  # one document of 128 tokens
    assert {sum(map(len, keys_of_queries(part, range(128)))) for part, _ in parts} == {128 * 129 / 2 / size}


# The model's forward and backward


def forward(name: str, task: str, share_prefix: bool, context: ContextGroup | None, rows=ROWS, lora: bool = False):
    """A model with gradients of some function of its outputs, and these."""
    model, batch = build(name, task), collate(rows)
    if lora:
        torch.manual_seed(1)
        changes = dict(init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **changes))
    if task == "ForCausalLM":
        pack_causal_lm(model, True, share_prefix, context=context)
        output = model(**batch, fused_lm_head=True)
        outputs = {field: output[field] for field in ("label_mask", *FIELDS)}
        value = output.log_probs
    else:
        pack_reward_model(model, True, share_prefix, context)
        del batch["labels"]
        output = model(**batch, output_router_logits=True if "MoE" in name else None, use_cache=False)
        outputs, value = {"logits": output.logits}, output.logits
    torch.manual_seed(2)
    loss = (value * torch.randn(value.shape)).sum()
    if "MoE" in name:
        outputs["aux_loss"] = output.aux_loss
        loss = loss + output.aux_loss
    loss.backward()
    return model, outputs


CASES = {
    f"{name}, {task}, {'shared' if share else 'packed'}": (name, task, share)
    for name in MODELS
    for task in ("ForCausalLM", "ForSequenceClassification")
    for share in (False, True)
    if not (name.startswith("Gemma") and task != "ForCausalLM")
}


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pair = dist.new_subgroups(2)[0]
    results = {}
    for size, group in zip(SIZES, (pair, dist.group.WORLD), strict=True):
        context = ContextGroup(group)
        x = torch.arange(6.0).view(3, 2).requires_grad_() if rank % size == 0 else torch.ones(3, 2, requires_grad=True)
        weight = torch.arange(1.0, 6 * size + 1).view(-1, 2)
        gathered = context.gather(x)
        (gathered * weight * (1 + rank % size)).sum().backward()
        results["gather", size] = (x.detach(), gathered.detach(), x.grad)
        for case, arguments in CASES.items():
            results[case, size] = mean_gradients(*forward(*arguments, context))
        results["lora", size] = mean_gradients(*forward("Llama", "ForCausalLM", True, context, lora=True))
        results["stride", size] = mean_gradients(*forward("Llama", "ForCausalLM", True, ContextGroup(group, 1)))
        changed = copy.deepcopy(ROWS)
        changed[1][1][1] = 30
        results["changed", size] = forward("Llama", "ForCausalLM", True, context, changed)[1]["log_probs"].detach()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def mean_gradients(model, outputs):
    gradients = gradients_of(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return {name: x.detach() for name, x in outputs.items()}, gradients


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of four ranks: as two groups of two, which have the same batch, and as a group of four."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(run_rank, (folder,), nprocs=4, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("size", SIZES)
def test_gathers_backward_sums_over_the_ranks(ranks, size):
    weight = torch.arange(1.0, 6 * size + 1).view(-1, 2)
    for first in range(0, 4, size):
        group = [rank["gather", size] for rank in ranks[first : first + size]]
        row = torch.cat([x for x, _, _ in group])
        for (_, gathered, grad), own in zip(group, weight.chunk(size), strict=True):
            assert torch.equal(gathered, row)
            assert torch.equal(grad, own * sum(range(1, size + 1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [*CASES, "lora", "stride"])
def test_every_rank_has_the_outputs_and_the_mean_gradient_of_one_process(ranks, case, size):
    arguments = CASES.get(case, ("Llama", "ForCausalLM", True))
    expected, expected_outputs = forward(*arguments, None, lora=case == "lora")
    for rank in ranks:
        outputs, gradients = rank[case, size]
        for name, x in expected_outputs.items():
            torch.testing.assert_close(outputs[name], x.detach(), rtol=1e-5, atol=1e-5, msg=name)
        assert_same_gradients(gradients, gradients_of(expected), rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_no_document_sees_another(ranks, size):
    """Another token in one document leaves the log-probs of all others the same, bit for bit."""
    before, after = ranks[0]["Llama, ForCausalLM, shared", size][0]["log_probs"], ranks[0]["changed", size]
    others = [row for row in range(len(before)) if row != 1]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1], after[1])


# The scripts


KEYS = {
    "max_steps": 4,
    "max_length": 64,
    "packing": True,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    # Adam would divide the noise of gradients that cancel out by their size
    "optim": "sgd",
    "learning_rate": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "do_eval": True,
    "test_split_size": 7,  # not a multiple of the batch
    "per_device_eval_batch_size": 2,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
LORA |= {"learning_rate": 1.0}
RUNS = {
    "sft": ("sft", {}),
    "rm": ("rm", {}),
    "dpo": ("dpo", {}),
    "dpo with LoRA": ("dpo", LORA),  # the reference is the model without its adapter
    "dpo, precomputed reference": ("dpo", {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}),
}
RESUMED = "resumed dpo"
SHARED = {"context_parallel_size": 2, "context_parallel_head_stride": 1}


@pytest.fixture(scope="module")
def named(tiny, sft_rows, pair_rows):
    """Task and recipe of a run of `RUNS`, by its name."""

    def name_run(name: str, folder: Path, **changes) -> tuple[str, dict]:
        task, keys = RUNS.get(name, ("dpo", {}))
        rows = sft_rows if task == "sft" else pair_rows
        return task, short_recipe(tiny, rows, folder / name, **KEYS | keys | changes)

    return name_run


@pytest.fixture(scope="module")
def folder(named, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for name in RUNS:
        run_script(*named(name, folder / "one"))
    return folder


@pytest.fixture(scope="module")
def shared(named, folder):
    """All runs, and one that resumes from one process's checkpoint, by a group of two processes under DDP."""
    shutil.copytree(folder / "one" / "dpo" / "checkpoint-2", folder / "shared" / RESUMED / "checkpoint-2")
    launch_runs([named(name, folder / "shared", **SHARED) for name in (*RUNS, RESUMED)], "ddp", processes=2)
    return folder


def assert_same_run(run: Path, expected: Path, but: tuple[str, ...] = ()) -> None:
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (run, expected)]
    assert_same_logs(*logs, rel=1e-4, abs=1e-6, but=("flos", *but))
    manifests = [json.loads((path / "checkpoint-4" / "manifest.json").read_text()) for path in (run, expected)]
    for name in ("epoch", "samples_in_epoch", "consumed_samples", "global_batch_size"):
        assert manifests[0][name] == manifests[1][name], name
    for file in expected.glob("*model.safetensors"):
        weights, others = load_file(run / file.name), load_file(file)
        for name, other in others.items():
            torch.testing.assert_close(weights[name], other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_group_of_processes_logs_and_saves_what_one_process_does(shared, name):
    # Before the first step policy and reference differ by rounding, and so which side has the higher reward
    but = ("accuracies",) if "precompute" in name else ()
    assert_same_run(shared / "shared" / name, shared / "one" / name, but)


@pytest.mark.slow
def test_a_group_resumes_from_the_checkpoint_of_one_process(shared):
    assert_same_run(shared / "shared" / RESUMED, shared / "one" / "dpo", but=("num_tokens", "train_loss"))


@pytest.mark.slow
def test_two_groups_that_share_the_weights_train_what_one_process_does(named, folder):
    """ZeRO-3 with four processes; what depends on how rows are cut into micro-batches is left out."""
    launch_runs([named("dpo", folder / "zero3", **SHARED)], "zero3", processes=4)
    means = ("entropy", "accurac", "logits", "epoch", "eval")
    assert_same_run(folder / "zero3" / "dpo", folder / "one" / "dpo", but=means)


# Refusals


BARE = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "max_length": 64, "packing": True}
SHARES = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        *[(task, SHARES | {"packing": False}, "context_parallel_size.*Set `packing: true`") for task in TASKS],
        ("sft", {"context_parallel_head_stride": 2}, "context_parallel_head_stride.*needs context_parallel_size"),
        (
            "sft",
            SHARES | {"neftune_noise_alpha": 5},
            "context_parallel_size.*neftune_noise_alpha",
        ),  # noise on embeddings
    ],
)
def test_what_does_not_go_with_it_is_refused(task, keys, message):
    with pytest.raises(RecipeError, match=message):
        parse(task, BARE | keys)


def test_processes_that_make_no_groups_are_refused():
    with pytest.raises(RecipeError, match="`context_parallel_size` 2 does not divide the 1 processes"):
        prepare(parse("sft", BARE | SHARES))


def test_accelerates_own_parallelism_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setattr(tunebook.recipe.configs.RunConfig, "world_size", 2, raising=False)
    with pytest.raises(RecipeError, match="context_parallel_size.*accelerate's parallelism_config"):
        parse("sft", BARE | SHARES)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_embeddings_of_the_longest_document_are_refused(rope):
    model = build("Llama")
    model.config.rope_parameters["rope_type"] = rope
    with pytest.raises(ValueError, match="context_parallel_size.*dynamic, longrope"):
        pack_causal_lm(model, context=ContextGroup(None))
