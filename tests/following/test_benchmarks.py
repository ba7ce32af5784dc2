"""Benchmarks: the real lm-eval on a tiny model, offline; a stand-in for it where only the running of jobs matters; the
real Slurm where it is installed."""

import json
import os
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from rich.console import Console
from slurm_cluster import slurm_cluster
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunebook.environment import without_launcher
from tunebook.files import read_rows
from tunebook.following import benchmarks
from tunebook.following.benchmarks import (
    BenchmarkCallback,
    BenchmarkJobs,
    benchmark_tasks,
    find_benchmark,
    lm_eval_command,
    read_scores,
)
from tunebook.following.scores import BenchmarkRow, add_scores_to_card, scores_table

BENCHMARKS = ROOT / "configs" / "benchmarks"
ARITHMETIC = [find_benchmark("arithmetic")]


def write_results(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026-01-01.json").write_text(json.dumps({"results": results}))


@pytest.fixture(scope="module")
def all_tasks():
    return set(TaskManager(include_path=str(BENCHMARKS / "local")).all_tasks)


class TestRunConfigs:
    @pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_benchmark_is_a_run_config_of_lm_eval_whose_tasks_exist(self, path, all_tasks):
        assert set(yaml.safe_load(path.read_text())) <= {field.name for field in fields(EvaluatorConfig)}
        assert set(benchmark_tasks(find_benchmark(path.stem))) <= all_tasks

    def test_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(ValueError, match="no benchmark gsm9k. Choose from .*gsm8k"):
            find_benchmark("gsm9k")

    def test_path_of_a_file_without_tasks_is_refused(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("model: hf\n")
        with pytest.raises(ValueError, match="has no `tasks`"):
            find_benchmark(str(tmp_path / "mine.yaml"))

    def test_metric_for_best_model_must_be_a_score_of_the_benchmarks(self):
        args = SimpleNamespace(benchmarks=["gsm8k"], benchmark_launcher="local")
        exact_match = "bench_gsm8k_exact_match_strict_match"
        for args.metric_for_best_model in (exact_match, f"eval_{exact_match}", "eval_loss", None):
            BenchmarkCallback.validate(args)
        args.metric_for_best_model = "eval_bench_mmlu_acc"
        with pytest.raises(ValueError, match="have the tasks gsm8k"):
            BenchmarkCallback.validate(args)


def model_args(command: list[str]) -> dict:
    return json.loads(command[command.index("--model_args") + 1])


class TestCommand:
    def test_run_config_keeps_its_model_args_and_gets_the_model(self, tmp_path):
        (tmp_path / "b.yaml").write_text("tasks: [gsm8k]\nmodel_args: {dtype: float32, max_length: 64}\n")
        command = lm_eval_command(tmp_path / "b.yaml", "org/model", tmp_path / "out", revision="v1-step-000000010")
        expected = {"dtype": "float32", "max_length": 64, "pretrained": "org/model", "revision": "v1-step-000000010"}
        assert model_args(command) == expected

    def test_adapter_is_loaded_on_the_base_model_that_it_names(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        command = lm_eval_command(find_benchmark("arithmetic"), str(tmp_path), tmp_path / "out")
        expected = {"pretrained": "org/base", "peft": str(tmp_path), "tokenizer": str(tmp_path)}
        assert model_args(command) == expected

    def test_environment_loses_the_launcher_and_slurm_but_keeps_the_rest(self):
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")
        launcher += ("MASTER_PORT", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_RUN_ID", "FSDP_VERSION", "SLURM_JOB_ID")
        kept = dict.fromkeys(("PATH", "HF_HOME", "SLURM_CONF", "SBATCH_PARTITION", "HF_TOKEN"), "mine")
        cleaned = without_launcher({**dict.fromkeys(launcher, "1"), **kept}, device="3")
        assert cleaned == {**kept, "CUDA_VISIBLE_DEVICES": "3"}


class TestScores:
    def test_filters_name_a_metric_only_where_there_are_several(self, tmp_path):
        gsm8k = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01}
        gsm8k |= {"exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": "N/A"}
        sums = {"acc,none": 0.75, "acc_stderr,none": 0.02}
        write_results(tmp_path / "a" / "b", {"gsm8k": gsm8k, "sums": sums})
        scores, stderr = read_scores(tmp_path, ["gsm8k", "sums"])
        exact_match = {"exact_match_strict_match": 0.25, "exact_match_flexible_extract": 0.5}
        assert scores == {"gsm8k": exact_match, "sums": {"acc": 0.75}}
        assert stderr == {"gsm8k": {"exact_match_strict_match": 0.01}, "sums": {"acc": 0.02}}

    def test_group_is_read_without_its_members_and_a_tag_by_its_tasks(self, tmp_path):
        write_results(tmp_path, {"mmlu": {"acc,none": 0.5}, "mmlu_law": {"acc,none": 0.4}})
        assert read_scores(tmp_path, ["mmlu"])[0] == {"mmlu": {"acc": 0.5}}
        assert set(read_scores(tmp_path, ["some_tag"])[0]) == {"mmlu", "mmlu_law"}

    def test_table_shows_the_difference_to_another_model_and_what_failed(self):
        rows = [
            BenchmarkRow(1, "gsm8k", "m", scores={"gsm8k": {"acc": 0.5}}, stderr={"gsm8k": {"acc": 0.01}}),
            BenchmarkRow(1, "mmlu", "m", status="failed", error="exit code 1\nTrace"),
        ]
        other = [BenchmarkRow(None, "gsm8k", "n", scores={"gsm8k": {"acc": 0.625}})]
        console = Console(width=120, record=True, file=open(os.devnull, "w"))
        console.print(scores_table(rows, other, title="mine", other_title="base"))
        text = console.export_text()
        assert "0.5000 ± 0.0100" in text and "0.6250" in text and "-0.1250" in text and "exit code 1" in text

    def test_card_gets_a_table_of_all_steps_and_the_scores_of_the_final_one_and_keeps_its_text(self, tmp_path):
        card = tmp_path / "README.md"
        text = "# Model\n\nText.\n\n## Benchmarks\n\nold table\n\n## Citation\n\nC.\n"
        card.write_text(f"---\nlicense: mit\nmodel_name: old\n---\n{text}")
        rows = [BenchmarkRow(step, "gsm8k", "m", scores={"gsm8k": {"acc": step / 100}}) for step in (10, 20)]
        for _ in range(2):
            add_scores_to_card(card, rows, "org/model", step=20)
        text = card.read_text()
        assert text.count("## Benchmarks") == 1 and "old table" not in text
        assert "| 10 | 0.1000 |" in text and "| 20 | 0.2000 |" in text
        assert "Text." in text and text.rstrip().endswith("## Citation\n\nC.")
        data = yaml.safe_load(text.split("---")[1])
        assert data["license"] == "mit"
        [result] = data["model-index"][0]["results"]
        assert data["model-index"][0]["name"] == "org/model"
        assert result["metrics"][0]["value"] == 0.2 and result["dataset"]["name"] == "gsm8k"


def independent_accuracy(folder: Path, rows: list[dict]) -> float:
    """arithmetic_choice without lm-eval: the choice with the largest sum of log-probabilities after the question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    correct = 0
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(prompt).input_ids)
            ids = torch.tensor([tokenizer(f"{prompt} {choice}").input_ids])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        correct += scores.index(max(scores)) == row["gold"]
    return correct / len(rows)


@pytest.mark.slow
def test_lm_eval_gives_the_accuracy_that_an_independent_computation_gives(tiny, tmp_path, monkeypatch):
    # As in a trainer that torchrun started: lm-eval would wait for rank 1 if it saw these.
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    [row] = BenchmarkJobs(tmp_path, [find_benchmark("arithmetic_choice")], timeout=300).run(str(tiny))
    assert row.status == "completed", row.error
    rows = [json.loads(line) for line in (BENCHMARKS / "local" / "arithmetic.jsonl").read_text().splitlines()]
    assert row.scores == {"arithmetic_choice": {"acc": pytest.approx(independent_accuracy(tiny, rows))}}
    assert read_rows(tmp_path / "benchmarks.jsonl") == [vars(row)]


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces lm-eval's command by a Python script; the script gets the results folder as its argument."""

    def replace(script: str):
        def command(benchmark, model, output_path, revision=None):
            return [sys.executable, "-c", textwrap.dedent(script), str(output_path), model, revision or ""]

        monkeypatch.setattr(benchmarks, "lm_eval_command", command)

    return replace


WRITE_RESULTS = """
import json, os, sys, time
folder = sys.argv[1]
json.dump({"results": {"arithmetic": {"acc,none": 0.5}}}, open(folder + "/results_1.json", "w"))
print("model", sys.argv[2], "revision", sys.argv[3], "device", os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


class TestJobs:
    def test_failing_benchmark_is_a_row_with_the_end_of_its_log(self, tmp_path, stand_in):
        stand_in("import sys; print('line one', flush=True); sys.exit('out of memory')")
        [row] = BenchmarkJobs(tmp_path, ARITHMETIC).run("org/model")
        assert row.status == "failed" and row.scores == {}
        assert row.error.splitlines() == ["exit code 1", "line one", "out of memory"]

    def test_benchmark_that_runs_too_long_is_killed(self, tmp_path, stand_in):
        stand_in("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        [row] = BenchmarkJobs(tmp_path, ARITHMETIC, timeout=1).run("org/model")
        assert row.status == "timed out" and row.seconds < 10
        with pytest.raises(ProcessLookupError):
            os.kill(int(row.error.splitlines()[-1]), 0)

    def test_as_many_jobs_run_at_a_time_as_there_are_devices_each_on_its_own(self, tmp_path, stand_in):
        stand_in(WRITE_RESULTS + "print(time.time())\ntime.sleep(0.5)\nprint(time.time())")
        jobs = BenchmarkJobs(tmp_path, ARITHMETIC, devices=["2", "5"])
        for step in (1, 2, 3):
            jobs.submit("org/model", step)
        assert sorted(row.step for row in jobs.wait()) == [1, 2, 3]
        logs = [(tmp_path / f"benchmarks/00000000{step}/arithmetic/log.txt").read_text() for step in (1, 2, 3)]
        assert "device 2" in logs[0] and "device 5" in logs[1]
        (_, end1), (start2, end2), (start3, _) = [map(float, log.splitlines()[1:]) for log in logs]
        assert start2 < end1 and start3 > min(end1, end2)

    def test_step_with_scores_is_not_run_again_and_one_that_failed_is(self, tmp_path, stand_in):
        for script, statuses in (("raise SystemExit(1)", ["failed"]), (WRITE_RESULTS, ["completed"]), ("", [])):
            stand_in(script)
            jobs = BenchmarkJobs(tmp_path, ARITHMETIC)
            jobs.submit("org/model", 10)
            assert [row.status for row in jobs.wait()] == statuses

    def test_results_of_an_earlier_attempt_are_not_taken_for_those_of_a_failing_one(self, tmp_path, stand_in):
        write_results(tmp_path / "benchmarks" / "000000010" / "arithmetic", {"arithmetic": {"acc,none": 0.9}})
        stand_in("raise SystemExit(1)")
        jobs = BenchmarkJobs(tmp_path, ARITHMETIC)
        jobs.submit("org/model", 10)
        assert [row.status for row in jobs.wait()] == ["failed"]


def test_slurm_jobs_give_their_scores_and_their_failures(tmp_path, monkeypatch, stand_in):
    with slurm_cluster(tmp_path / "slurm", monkeypatch):
        quoted = "a 'quoted', \"model\""
        stand_in(WRITE_RESULTS + "print('Slurm job', os.environ['SLURM_JOB_ID'])\nsys.exit(sys.argv[2] == 'bad')")
        jobs = BenchmarkJobs(tmp_path, ARITHMETIC, launcher="slurm", timeout=120)
        jobs.submit(quoted, 1, revision="v1-step-000000001")
        [row] = jobs.wait()
        log = (tmp_path / "benchmarks" / "000000001" / "arithmetic" / "log.txt").read_text()
        assert row.status == "completed" and row.scores == {"arithmetic": {"acc": 0.5}}
        assert f"model {quoted} revision v1-step-000000001 device 0" in log and "Slurm job" in log

        stand_in("raise SystemExit('no such model')")
        jobs.submit("org/model", 2)
        [row] = jobs.wait()
        assert row.status == "failed" and "no such model" in row.error


def test_an_adapter_with_more_tokens_than_its_base_is_merged_first(tiny, tmp_path, monkeypatch):
    """lm-eval would load the base model, whose embeddings have too few rows for the adapter's."""
    tokenizer, base = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer.add_tokens(["<one>", "<two>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    script = """
import json, sys
from transformers import AutoModelForCausalLM
model, folder = sys.argv[1:]
scores = {"arithmetic": {"acc,none": len(AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight)}}
json.dump({"results": scores}, open(folder + "/results_1.json", "w"))
"""
    command = lambda benchmark, model, out, revision=None: [sys.executable, "-c", script, model, str(out)]  # noqa: E731
    monkeypatch.setattr(benchmarks, "lm_eval_command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    [row] = BenchmarkJobs(tmp_path / "run", ARITHMETIC).run(str(tmp_path / "adapter"))
    assert row.status == "completed", row.error
    assert row.scores == {"arithmetic": {"acc": len(tokenizer)}}
    assert not list(tmp_path.glob("run/**/merged"))
    assert not benchmarks.has_larger_vocabulary(str(tiny))
