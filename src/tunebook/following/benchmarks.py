"""Benchmarks of a model: lm-eval in processes of its own, on this machine or by Slurm.

A benchmark is a run config of lm-eval, one file of `configs/benchmarks/`; what comes of it is a row (`scores.py`).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import without_launcher
from ..files import append_rows, read_rows, read_yaml, shipped
from ..recipe.needs import is_benchmark
from .scores import ROWS_FILE

logger = logging.getLogger(__name__)

LOG_TAIL = 20  # lines


def find_benchmark(name: str) -> Path:
    """Return the run config of a benchmark: a name in `configs/benchmarks/`, or a path.

    Raises:
        ValueError: there is no such file, or it names no tasks.
    """
    folder = Path("configs/benchmarks")
    path = shipped(name if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in shipped(folder).glob("*.yaml")))
        raise ValueError(f"There is no benchmark {name}; choose from {known}, or give a path")
    if not read_benchmark(path).get("tasks"):
        raise ValueError(f"{path} is not a run config of lm-eval: it has no `tasks`")
    return path.resolve()


def read_benchmark(path: Path) -> dict[str, Any]:
    return read_yaml(path.read_text(encoding="utf-8"), str(path))


def benchmark_tasks(benchmark: Path) -> list[str]:
    tasks = read_benchmark(benchmark)["tasks"]
    return tasks.split(",") if isinstance(tasks, str) else tasks


def is_benchmark_metric(metric_for_best_model: str | None, benchmarks: Sequence[Path]) -> bool:
    """Return whether the best model is chosen by a benchmark's score, so that evaluations must wait for benchmarks.

    Raises:
        ValueError: these benchmarks have no such score.
    """
    if not is_benchmark(metric_for_best_model):
        return False
    metric = f"eval_{metric_for_best_model.removeprefix('eval_')}"
    tasks = [task for benchmark in benchmarks for task in benchmark_tasks(benchmark)]
    if not any(metric.startswith(f"eval_bench_{task}_") for task in tasks):
        raise ValueError(
            f"metric_for_best_model is {metric_for_best_model}, but the benchmarks have the tasks "
            f"{', '.join(tasks) or '(none)'}; use eval_bench_<task>_<metric>"
        )
    return True


def lm_eval_command(benchmark: Path, model: str, output_path: Path, revision: str | None = None) -> list[str]:
    """The command that runs a benchmark on a folder or a Hub model, given in the benchmark's own folder.

    A folder with an adapter is loaded on the base model that it names, with the adapter's tokenizer. An adapter cannot
    be given by revision: lm-eval 0.4.13 asks the base model for the same revision.
    """
    model_args = read_benchmark(benchmark).get("model_args", {}) | {"pretrained": model}
    adapter_config = Path(model) / "adapter_config.json"
    if adapter_config.exists():
        base_model = json.loads(adapter_config.read_text())["base_model_name_or_path"]
        model_args |= {"pretrained": base_model, "peft": model, "tokenizer": model}
    if revision:
        model_args["revision"] = revision
    options = {"--config": benchmark, "--model_args": json.dumps(model_args), "--output_path": output_path}
    return [sys.executable, "-m", "lm_eval", "run", *(str(part) for option in options.items() for part in option)]


def sbatch_command(command: list[str], name: str, log: Path, timeout: float) -> list[str]:
    """The command that runs another one as a Slurm job and returns its exit code when the job ends."""
    minutes = max(1, int(timeout // 60))
    options = [f"--job-name={name}", f"--output={log}", f"--time={minutes}", "--open-mode=append"]
    return ["sbatch", "--wait", "--parsable", *options, str(shipped("launch/benchmark.slurm").resolve()), *command]


def read_scores(output_path: Path, tasks: Sequence[str]) -> tuple[dict, dict]:
    """Scores and their standard errors, as `{task: {metric: value}}`, from the newest results of lm-eval in a folder.

    Of a group, the group's; of a tag, those of its tasks. A metric is named `exact_match`, or
    `exact_match_strict_match` where a task computes it behind several filters.

    Raises:
        FileNotFoundError: there are no results.
    """
    files = sorted(output_path.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"There are no results in {output_path}")
    results = json.loads(files[-1].read_text())["results"]
    scores, errors = {}, {}
    for task in [task for task in tasks if task in results] or results:
        numbers = {tuple(key.split(",")): value for key, value in results[task].items() if "," in key}
        metrics = [metric for metric, _ in numbers]
        for (metric, filter_name), value in numbers.items():
            name = f"{metric}_{filter_name.replace('-', '_')}" if metrics.count(metric) > 1 else metric
            if not isinstance(value, int | float):
                continue  # lm-eval writes "N/A" for a standard error that it did not compute
            if metric.endswith("_stderr"):
                errors.setdefault(task, {})[name.replace("_stderr", "")] = value
            else:
                scores.setdefault(task, {})[name] = value
    return scores, errors


@dataclass
class Job:
    benchmark: Path
    step: int | None
    model: str
    revision: str | None
    folder: Path  # of its log and results
    process: subprocess.Popen | None = None
    device: str | None = None
    start: float = 0.0


class BenchmarkJobs:
    """Runs benchmarks, one on each device at a time, or all at once by Slurm; started and looked after by `poll`.

    Args:
        output_dir: of the run; results and logs go to `benchmarks/<step>/<benchmark>/`, rows to `benchmarks.jsonl`.
        launcher: "local" or "slurm".
        devices: values of CUDA_VISIBLE_DEVICES, one for each job that may run at a time; none: one job, on all.
        timeout: seconds that one benchmark may run. A Slurm job may wait in its queue beside that.
    """

    def __init__(
        self,
        output_dir: Path,
        launcher: str = "local",
        devices: Sequence[str] = (),
        timeout: float = 7200,
    ):
        self.folder = Path(output_dir).resolve() / "benchmarks"
        self.rows_file = Path(output_dir) / ROWS_FILE
        self.launcher, self.timeout = launcher, timeout
        self.devices: list[str | None] = list(devices) or [None]
        self.waiting: list[Job] = []
        self.running: list[Job] = []

    @property
    def unfinished_steps(self) -> set[int | None]:
        return {job.step for job in (*self.waiting, *self.running)}

    def step_folder(self, step: int | None) -> Path:
        return self.folder / ("model" if step is None else f"{step:09d}")

    def submit(self, benchmark: Path, model: str, step: int | None = None, revision: str | None = None) -> None:
        """Queue a benchmark of a model, unless `benchmarks.jsonl` has its scores at this step."""
        done = {(row["step"], row["benchmark"]) for row in read_rows(self.rows_file) if row["status"] == "completed"}
        if step is not None and (step, benchmark.stem) in done:
            return
        if revision is None and Path(model).exists():
            model = str(Path(model).resolve())  # a job has a working directory of its own
        self.waiting.append(Job(benchmark, step, model, revision, self.step_folder(step) / benchmark.stem))

    def poll(self) -> list[dict]:
        """Start what can be started; return the rows of what has ended since the last call, written to the file."""
        rows = [self._row(job) for job in self.running if job.process.poll() is not None or self._is_late(job)]
        self.running = [job for job in self.running if job.process.returncode is None]
        while self.waiting and (self.launcher == "slurm" or len(self.running) < len(self.devices)):
            self._start(self.waiting.pop(0))
        append_rows(self.rows_file, rows)
        return rows

    def wait(self) -> list[dict]:
        """Poll until nothing is left to run."""
        rows = self.poll()
        while self.running:
            time.sleep(0.5)
            rows += self.poll()
        return rows

    def _is_late(self, job: Job) -> bool:
        return self.launcher == "local" and time.monotonic() - job.start > self.timeout

    def _start(self, job: Job) -> None:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        job.start = time.monotonic()
        log = job.folder / "log.txt"
        command = lm_eval_command(job.benchmark, job.model, job.folder, job.revision)
        if self.launcher == "slurm":
            command = sbatch_command(command, f"benchmark-{job.benchmark.stem}-{job.step}", log, self.timeout)
        else:
            busy = [other.device for other in self.running]
            job.device = next(device for device in self.devices if device not in busy)
        environment = without_launcher(os.environ, job.device)
        # In the group of this process, so that whatever ends the training ends the benchmark.
        with log.open("ab") as stream:
            job.process = subprocess.Popen(
                command, cwd=job.benchmark.parent, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
        self.running.append(job)

    def _row(self, job: Job) -> dict:
        row = {"step": job.step, "benchmark": job.benchmark.stem, "model": job.model, "revision": job.revision}
        row |= {"status": "completed", "seconds": round(time.monotonic() - job.start, 1)}
        row |= {"scores": {}, "stderr": {}, "error": ""}
        if job.process.returncode is None:
            job.process.kill()
            job.process.wait()
            row |= {"status": "timed out", "error": f"ran for more than {self.timeout} s\n"}
        else:
            try:
                row["scores"], row["stderr"] = read_scores(job.folder, benchmark_tasks(job.benchmark))
            except FileNotFoundError:
                row |= {"status": "failed", "error": f"exit code {job.process.returncode}\n"}
        if row["status"] != "completed":
            lines = (job.folder / "log.txt").read_text(errors="replace").splitlines()
            row["error"] += "\n".join(lines[-LOG_TAIL:])
            logger.warning("Benchmark %s of %s %s:\n%s", row["benchmark"], job.model, row["status"], row["error"])
        return row


def run_benchmarks(
    model: str,
    benchmarks: Sequence[Path],
    output_dir: Path,
    *,
    revision: str | None = None,
    launcher: str = "local",
    devices: Sequence[str] = (),
    timeout: float = 7200,
) -> list[dict]:
    """Run benchmarks on any model, a folder or a Hub id, to their end; return their rows, whose step is None."""
    jobs = BenchmarkJobs(output_dir, launcher, devices, timeout)
    for benchmark in benchmarks:
        jobs.submit(benchmark, model, revision=revision)
    return jobs.wait()
