"""Training runs that are followed: a real trainer, the real huggingface_hub against a Hub on loopback, and a stand-in
for lm-eval, since what matters here is when a benchmark is started and what becomes of its scores.

This file is also the script that the distributed test launches: tests/test_callbacks.py MODEL OUT
"""

import errno
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import launch, train, write_rows
from hub_server import HubServer, reach_loopback
from huggingface_hub import HfApi
from plain_trainer import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from tunebook.files import read_rows
from tunebook.following import benchmarks, build_callbacks, finish_callbacks, hub
from tunebook.following.pairs import PairAccuracyCallback
from tunebook.following.staging import stage_model
from tunebook.following.trackers import set_wandb_environment
from tunebook.recipe.configs import ScriptArguments

REPO = "org/model"
PUSH = {"push_to_hub_revision": True, "hub_model_id": REPO, "hub_revision": "v1"}
ARITHMETIC = {"benchmarks": ["arithmetic"]}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
BEST |= {"metric_for_best_model": "eval_bench_arithmetic_acc"}
# The score of a checkpoint comes from its step, which the folder's name tells; the model must be readable.
LM_EVAL = """
import json, sys
from safetensors import safe_open
folder, model, revision = sys.argv[1:]
if not revision:
    file = safe_open(model + "/model.safetensors", framework="numpy")
    assert all(file.get_slice(name).get_shape() for name in file.keys())
step = int(folder.split("/")[-2])
scores = {1: 0.25, 2: 0.75, 3: 0.5}
if step == FAILING:
    sys.exit("out of memory")
json.dump({"results": {"arithmetic": {"acc,none": scores[step]}}}, open(folder + "/results_1.json", "w"))
"""


def stand_in_command(failing: int, models: list, benchmark, model, output_path, revision=None) -> list[str]:
    models.append((model, revision))
    script = LM_EVAL.replace("FAILING", str(failing))
    return [sys.executable, "-c", script, str(output_path), model, revision or ""]


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    reach_loopback(monkeypatch)


@pytest.fixture
def server(monkeypatch):
    with HubServer() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        yield server


@pytest.fixture
def lm_eval(monkeypatch):
    """Replaces lm-eval and records which models it was given; called with the step at which it fails."""
    models = []

    def replace(failing: int = 0):
        monkeypatch.setattr(benchmarks, "lm_eval_command", partial(stand_in_command, failing, models))
        return models

    return replace


def callback_at(event: str, function) -> TrainerCallback:
    """A callback that calls `function(state, model)` at an event."""
    at_event = lambda self, args, state, control, model=None, **kwargs: function(state, model)  # noqa: E731
    return type("At", (TrainerCallback,), {event: at_event})()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def save_each_step(model: Path, out: Path, **arguments) -> Trainer:
    """Three steps, a checkpoint after each, of which only the last is kept."""
    return make_trainer(model, out, save_strategy="steps", save_steps=1, save_total_limit=1, **arguments)


def run(trainer: Trainer, resume_from_checkpoint: str | None = None) -> dict:
    """Train, save and finish, as a recipe's run does; returns the weights at each save."""
    weights = {}

    def record(state, model):
        weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    callbacks = build_callbacks(trainer, ScriptArguments())
    for callback in (callback_at("on_save", record), *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    finish_callbacks(trainer, callbacks, out)
    return weights


def assert_revision_holds(revision: str, weights: dict, cache: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(REPO, revision=revision, cache_dir=cache).state_dict()
    AutoTokenizer.from_pretrained(REPO, revision=revision, cache_dir=cache)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_slow_hub_gets_every_checkpoint_though_only_one_is_kept_and_the_card_shows_their_scores(
    tiny, tmp_path, server, lm_eval
):
    lm_eval()
    server.delay("/preupload/", 0.5)
    trainer = save_each_step(tiny, tmp_path / "out", logging_steps=1, **ARITHMETIC, hub_push_to_main=True, **PUSH)
    weights = run(trainer)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    for step in (1, 2, 3):
        assert_revision_holds(f"v1-step-{step:09d}", weights[step], tmp_path / "cache")
    for revision in ("v1", "main"):
        assert_revision_holds(revision, weights[3], tmp_path / "cache")
    assert not torch.equal(weights[1]["lm_head.weight"], weights[2]["lm_head.weight"])

    rows = read_rows(tmp_path / "out" / "benchmarks.jsonl")
    acc = "eval_bench_arithmetic_acc"
    logged = [(log["step"], log[acc]) for log in trainer.state.log_history if acc in log]
    assert [(row["step"], row["scores"]["arithmetic"]["acc"]) for row in rows] == [(1, 0.25), (2, 0.75), (3, 0.5)]
    assert logged == [(1, 0.25), (2, 0.75), (3, 0.5)]
    card = server.repos[REPO].resolve("v1").tree["README.md"].data.decode()
    assert "| 2 | 0.7500 |" in card
    [result] = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5
    assert list((tmp_path / "out" / "hub_pending").iterdir()) == []
    assert list((tmp_path / "out" / "benchmarks").glob("*/model")) == []


def test_hub_that_is_down_all_the_time_does_not_stop_the_run_which_says_what_to_push(
    tiny, tmp_path, monkeypatch, caplog, lm_eval, server
):
    models = lm_eval()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    trainer = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, **PUSH)
    weights = run(trainer)
    assert trainer.state.global_step == 3 and len(models) == 3
    for revision in ("v1", "v1-step-000000001", "v1-step-000000002", "v1-step-000000003"):
        assert f"{revision}:" in caplog.text
    assert f"tunebook push {tmp_path / 'out'}" in caplog.text

    assert hub.Uploads(HfApi(endpoint=server.url), tmp_path / "out").finish() is None
    for step in (1, 2, 3):
        assert_revision_holds(f"v1-step-{step:09d}", weights[step], tmp_path / "cache")


def test_refused_push_ends_the_run_at_the_next_save_if_asked(tiny, tmp_path, server):
    server.fail("/commit/", 403)
    trainer = save_each_step(tiny, tmp_path / "out", hub_push_failure="raise", **PUSH)
    [push] = build_callbacks(trainer, ScriptArguments())
    wait = lambda state, model: wait_for(lambda: state.global_step == 0 or push.uploads.refused)  # noqa: E731
    trainer.add_callback(push)
    trainer.add_callback(callback_at("on_step_begin", wait))
    with pytest.raises(hub.NotPushedError, match="v1-step-000000001: .*403"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").exists()


def test_push_that_fails_to_the_end_makes_the_run_fail_if_asked(tiny, tmp_path, server):
    server.fail("/api/repos/create", 503)
    trainer = save_each_step(tiny, tmp_path / "out", hub_push_failure="raise", **PUSH)
    with pytest.raises(hub.NotPushedError, match=r"4 revision\(s\) were not pushed"):
        run(trainer)
    assert trainer.state.global_step == 3


def test_resumed_run_pushes_and_benchmarks_what_the_killed_one_did_not_and_nothing_twice(
    tiny, tmp_path, server, lm_eval
):
    lm_eval()
    server.fail("/commit/v1-step-000000002", 503)
    killed = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, **PUSH)
    callbacks = build_callbacks(killed, ScriptArguments())

    def kill(state, model):
        if state.global_step == 2:
            wait_for(lambda: any("/commit/v1-step-000000002" in path for _, path in server.requests))
            raise KeyboardInterrupt

    for callback in (callback_at("on_step_begin", kill), *callbacks):
        killed.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    callbacks[1].uploads.close()  # its thread dies with the process
    assert set(server.repos[REPO].branches) == {"main", "v1-step-000000001", "v1-step-000000002"}
    pushed = server.repos[REPO].branches["v1-step-000000001"]
    assert server.repos[REPO].files("v1-step-000000002") == set()

    server.faults.clear()
    resumed = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, **PUSH)
    run(resumed, str(tmp_path / "out" / "checkpoint-2"))
    assert "model.safetensors" in server.repos[REPO].files("v1-step-000000002")
    assert server.repos[REPO].branches["v1-step-000000001"] == pushed
    rows = read_rows(tmp_path / "out" / "benchmarks.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def follow(tiny: Path, rows: Path, out: Path, **keys) -> None:
    """A run of the recipe's script, saved at each of 3 steps, of which it keeps one."""
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train("sft", tiny, rows, out, **saves | keys)


def assert_all_was_made_up(server, out: Path) -> None:
    assert {f"v1-step-{step:09d}" for step in (1, 2, 3)} | {"v1"} <= set(server.repos[REPO].branches)
    assert all("model.safetensors" in server.repos[REPO].files(f"v1-step-{step:09d}") for step in (1, 2, 3))
    assert [row["step"] for row in read_rows(out / "benchmarks.jsonl")] == [1, 2, 3]
    assert not list((out / "hub_pending").iterdir()) and not list((out / "benchmarks").glob("*/*model*"))


def test_run_that_was_killed_between_a_save_and_its_copies_owes_nothing_in_the_end(
    tiny, sft_rows, tmp_path, server, lm_eval
):
    lm_eval()
    out = tmp_path / "out"
    follow(tiny, sft_rows, out, max_steps=2, save_total_limit=None)  # follows nothing, as if killed before the copies
    (out / "hub_pending" / ".1-v1-step-000000002-x").mkdir(parents=True)
    (out / "benchmarks" / "000000002" / ".model-x").mkdir(parents=True)
    follow(tiny, sft_rows, out, **ARITHMETIC, **PUSH)
    assert_all_was_made_up(server, out)


def test_copies_for_which_there_is_no_room_are_made_up_for_and_their_checkpoints_kept_until_then(
    tiny, sft_rows, tmp_path, server, lm_eval, monkeypatch, caplog
):
    lm_eval()
    calls = []

    def full(source, target):
        calls.append(source)
        if len(calls) <= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        stage_model(source, target)

    for module in (hub, benchmarks):
        monkeypatch.setattr(module, "stage_model", full)
    follow(tiny, sft_rows, tmp_path / "out", **ARITHMETIC, **PUSH)
    assert_all_was_made_up(server, tmp_path / "out")
    assert "There is no room for a copy of checkpoint-1" in caplog.text


def test_tracker_that_finds_the_disk_full_is_a_warning(tiny, sft_rows, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardCallback, "on_log", full)
    train("sft", tiny, sft_rows, tmp_path / "out", report_to="tensorboard")
    said = [record.getMessage() for record in caplog.records if "TensorBoardCallback" in record.getMessage()]
    assert said == ["There is no room for what TensorBoardCallback writes. The run continues without it."]


@pytest.mark.parametrize("schedule", ["after", "beside"])
def test_failing_benchmark_is_reported_and_stops_neither_training_nor_the_others(
    tiny, tmp_path, lm_eval, caplog, schedule
):
    lm_eval(failing=2)
    trainer = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, benchmark_schedule=schedule)
    run(trainer)
    rows = read_rows(tmp_path / "out" / "benchmarks.jsonl")
    assert [(row["step"], row["status"]) for row in rows] == [(1, "completed"), (2, "failed"), (3, "completed")]
    assert "out of memory" in caplog.text and trainer.state.global_step == 3


def test_benchmarks_beside_training_are_in_the_trackers_before_it_ends(tiny, tmp_path, lm_eval):
    lm_eval()
    trainer = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, benchmark_schedule="beside")
    [callback] = build_callbacks(trainer, ScriptArguments())
    wait = lambda state, model: wait_for(lambda: all(r.ready() for _, r in callback.jobs.unfinished))  # noqa: E731
    trainer.add_callback(callback)
    trainer.add_callback(callback_at("on_step_end", wait))
    trainer.train()
    assert 1 in [log["step"] for log in trainer.state.log_history if "eval_bench_arithmetic_acc" in log]
    callback.jobs.wait()  # the last one would run into the next test


class TestFromTheHub:
    """Jobs of another machine load the Hub's revision; here they run on this one."""

    @pytest.fixture(autouse=True)
    def slurm_without_a_queue(self, monkeypatch):
        monkeypatch.setattr(benchmarks, "sbatch_command", lambda command, name, log, timeout: command)

    def test_pushed_checkpoint_is_benchmarked_at_its_revision(self, tiny, tmp_path, server, lm_eval):
        models = lm_eval()
        run(save_each_step(tiny, tmp_path / "out", **ARITHMETIC, benchmark_launcher="slurm", **PUSH))
        assert sorted(models) == [(REPO, f"v1-step-{step:09d}") for step in (1, 2, 3)]

    def test_checkpoint_whose_push_failed_is_benchmarked_from_its_folder(self, tiny, tmp_path, server, lm_eval):
        models = lm_eval()
        server.fail("/commit/v1-step-000000001", 403)
        server.fail("/commit/v1-step-000000002", 503)
        run(save_each_step(tiny, tmp_path / "out", **ARITHMETIC, benchmark_launcher="slurm", **PUSH))
        folders = {str(tmp_path / "out" / "benchmarks" / f"{step:09d}" / "model") for step in (1, 2)}
        assert {model for model, revision in models if revision is None} == folders
        assert [revision for _, revision in models if revision] == ["v1-step-000000003"]
        assert [row["status"] for row in read_rows(tmp_path / "out" / "benchmarks.jsonl")] == ["completed"] * 3


class TestBestModel:
    @pytest.mark.parametrize(("failing", "best"), [(0, 2), (2, 3)])
    def test_is_chosen_by_a_benchmark_and_never_one_whose_benchmark_failed(
        self, tiny, tmp_path, lm_eval, failing, best
    ):
        lm_eval(failing)
        trainer = save_each_step(tiny, tmp_path / "out", **ARITHMETIC, **BEST)
        weights = run(trainer)
        assert trainer.state.best_global_step == best
        final = trainer.model.state_dict()
        assert all(torch.equal(final[name], weights[best][name]) for name in final)
        card = (tmp_path / "out" / "README.md").read_text()
        [result] = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
        assert result["metrics"][0]["value"] == trainer.state.best_metric == {2: 0.75, 3: 0.5}[best]

    @pytest.mark.slow
    def test_is_chosen_alike_by_two_processes(self, tiny, tmp_path):
        run = launch(__file__, tiny, tmp_path, config="ddp", processes=2)
        assert run.returncode == 0, run.stderr[-3000:]
        assert {path.read_text() for path in tmp_path.glob("best-*")} == {"2 0.75"}
        assert len(list(tmp_path.glob("best-*"))) == 2


def test_reward_model_is_benchmarked_by_subset_at_every_evaluation(tiny, tmp_path, monkeypatch):
    trainer = save_each_step(tiny, tmp_path / "out", eval_strategy="steps", eval_steps=1)
    sides = [("a", 2, 1), ("a", 1, 1), ("b", 3, 5), ("b", 9, 0), ("b", 4, 1)]  # a tie is half
    pairs = [{"prompt": "p", "chosen": str(c), "rejected": str(r), "subset": s} for s, c, r in sides]
    trainer.args.pair_benchmarks = [str(write_rows(tmp_path / "pairs.jsonl", pairs))]
    # The reward of a completion is the number that it is
    monkeypatch.setattr("tunebook.following.pairs.score_completions", lambda *given: [float(c) for _, c in given[-1]])
    trainer.add_callback(PairAccuracyCallback(trainer, ScriptArguments()))
    metrics = trainer.evaluate()
    expected = {"accuracy": 3.5 / 5, "accuracy_a": 1.5 / 2, "accuracy_b": 2 / 3}
    assert {f"eval_bench_pairs_{name}": value for name, value in expected.items()}.items() <= metrics.items()
    assert read_rows(tmp_path / "out" / "benchmarks.jsonl")[0]["scores"] == {"pairs": expected}


def test_wandb_gets_the_recipe_s_settings_and_they_are_refused_where_they_would_do_nothing(monkeypatch):
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "before")
    keys = {"wandb_entity": None, "wandb_project": None, "wandb_run_group": None}
    set_wandb_environment(SimpleNamespace(report_to=["wandb"], **keys | {"wandb_project": "after"}))
    assert os.environ["WANDB_PROJECT"] == "after" and "WANDB_ENTITY" not in os.environ
    with pytest.raises(ValueError, match="`wandb_entity` would have no effect"):
        set_wandb_environment(SimpleNamespace(report_to=["tensorboard"], **keys | {"wandb_entity": "team"}))


if __name__ == "__main__":
    benchmarks.lm_eval_command = partial(stand_in_command, 0, [])
    options = {"use_cpu": False, "ddp_backend": "gloo", **ARITHMETIC, **BEST}
    trainer = save_each_step(Path(sys.argv[1]), Path(sys.argv[2]), **options)
    run(trainer)
    best = f"{trainer.state.best_global_step} {trainer.state.best_metric}"
    Path(sys.argv[2], f"best-{trainer.args.process_index}").write_text(best)
    trainer.end()  # gloo's threads abort a process that ends without it
