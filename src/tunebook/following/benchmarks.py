"""Benchmarks of a model: lm-eval in processes of its own, on this machine or by Slurm.

A benchmark is a run config of lm-eval, a file of `configs/benchmarks/`. Its result is a [`BenchmarkRow`].
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoTokenizer, TrainerState

from ..checkpoints import optional, step_of
from ..environment import without_launcher
from ..files import delete_folder, read_yaml, shipped
from ..packing.context_parallel import TRLTrainer
from ..recipe.configs import CausalLMConfig, RunConfig
from ..recipe.needs import is_benchmark
from .hub import PushToHubRevisionCallback, step_revision
from .scores import ROWS_FILE, BenchmarkRow, Metrics, Scores, add_scores_to_card, read_scored_rows, write_scored_rows
from .staging import StagingCallback, stage_model
from .trackers import log_at_step

logger = logging.getLogger(__name__)

LOG, LOG_TAIL = "log.txt", 20  # lines
SLURM_JOBS = 64  # submitted at a time


def find_benchmark(name: str) -> Path:
    """Return the run config of a benchmark: a name in `configs/benchmarks/`, or a path.

    Raises:
        ValueError: there is no such file, or it names no tasks.
    """
    folder = Path("configs/benchmarks")
    path = shipped(name if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in shipped(folder).glob("*.yaml")))
        raise ValueError(f"There is no benchmark {name}. Choose from {known}, or give a path.")
    if not read_benchmark(path).get("tasks"):
        raise ValueError(f"{path} is not a run config of lm-eval: it has no `tasks`.")
    return path.resolve()


def read_benchmark(path: Path) -> dict[str, Any]:
    return read_yaml(path.read_text(encoding="utf-8"), str(path))


def benchmark_tasks(benchmark: Path) -> list[str]:
    tasks = read_benchmark(benchmark)["tasks"]
    return tasks.split(",") if isinstance(tasks, str) else tasks


def lm_eval_command(benchmark: Path, model: str, output_path: Path, revision: str | None = None) -> list[str]:
    """Return the command that runs a benchmark on a folder or a Hub model; its working directory is the benchmark's.

    A folder with an adapter is loaded on the base model that it names, with the adapter's tokenizer. An adapter cannot
    be given by revision: lm-eval 0.4.13 asks the base model for the same revision.
    """
    model_args = read_benchmark(benchmark).get("model_args", {}) | {"pretrained": model}
    if base := base_model(model):
        model_args |= {"pretrained": base, "peft": model, "tokenizer": model}
    if revision:
        model_args["revision"] = revision
    command = [sys.executable, "-m", "lm_eval", "run", "--config", str(benchmark)]
    return [*command, "--model_args", json.dumps(model_args), "--output_path", str(output_path)]


def base_model(model: str | Path) -> str | None:
    """Return the base model that the folder of an adapter names; None for a whole model."""
    config = Path(model) / "adapter_config.json"
    return json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else None


def has_larger_vocabulary(model: str) -> bool:
    """Return whether a model is the folder of an adapter with more tokens than its base model has rows of embeddings:
    lm-eval loads the base model as it is, which the adapter then does not fit."""
    if (base := base_model(model)) is None:
        return False
    rows: int = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    return len(AutoTokenizer.from_pretrained(model)) > rows


def merge_command(adapter: str, out: Path) -> list[str]:
    return [sys.executable, "-c", "from tunebook.tools.cli import app; app()", "merge", adapter, str(out)]


def sbatch_command(command: list[str], name: str, log: Path, timeout: float) -> list[str]:
    """Return the command that runs another one as a Slurm job and returns its exit code when the job ends."""
    minutes = max(1, int(timeout // 60))
    options = [f"--job-name={name}", f"--output={log}", f"--time={minutes}", "--open-mode=append"]
    return ["sbatch", "--wait", "--parsable", *options, str(shipped("launch/benchmark.slurm").resolve()), *command]


def read_scores(output_path: Path, tasks: Sequence[str]) -> tuple[Scores, Scores]:
    """Return scores and their standard errors from the newest results of lm-eval in a folder.

    A group has its own scores, without its members'; a tag has those of its tasks. A metric is named `exact_match`, or
    `exact_match_strict_match` where a task computes it behind several filters.

    Raises:
        FileNotFoundError: there are no results.
    """
    files = sorted(output_path.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"There are no results in {output_path}.")
    results = json.loads(files[-1].read_text())["results"]
    scores: Scores = {}
    errors: Scores = {}
    for task in [task for task in tasks if task in results] or results:
        numbers = {tuple(key.split(",")): value for key, value in results[task].items() if "," in key}
        metrics = [metric for metric, _ in numbers]
        for (metric, filter_name), value in numbers.items():
            if not isinstance(value, int | float):
                continue  # lm-eval writes "N/A" for a standard error that it did not compute
            name = f"{metric}_{filter_name.replace('-', '_')}" if metrics.count(metric) > 1 else metric
            table = errors if metric.endswith("_stderr") else scores
            table.setdefault(task, {})[name.replace("_stderr", "")] = value
    return scores, errors


class BenchmarkJobs:
    """Runs benchmarks in threads: locally one per device at a time, else as many Slurm jobs.

    Args:
        output_dir: gets results and logs in `benchmarks/<step>/<benchmark>/`, and rows in `benchmarks.jsonl`.
        benchmarks: their run configs, from [`find_benchmark`].
        launcher: "local" or "slurm".
        devices: CUDA_VISIBLE_DEVICES of each job that may run at a time. Default: one job, on all devices.
        timeout: seconds that one benchmark may run, without the time that a Slurm job waits in its queue.
    """

    def __init__(
        self,
        output_dir: Path,
        benchmarks: Sequence[Path],
        launcher: str = "local",
        devices: Sequence[str] = (),
        timeout: float = 7200,
    ):
        self.folder, self.rows_file = Path(output_dir).resolve() / "benchmarks", Path(output_dir) / ROWS_FILE
        self.benchmarks, self.launcher, self.timeout = benchmarks, launcher, timeout
        self.free_devices: SimpleQueue[str | None] = SimpleQueue()
        for device in (None,) * SLURM_JOBS if launcher == "slurm" else devices or (None,):
            self.free_devices.put(device)
        self.pool = ThreadPool(self.free_devices.qsize())  # daemons: a run that ends early does not wait for them
        self.unfinished: list[tuple[BenchmarkRow, AsyncResult[None]]] = []
        self.submitted_steps: set[int | None] = set()

    @property
    def unfinished_steps(self) -> set[int | None]:
        return {row.step for row, _ in self.unfinished}

    def step_folder(self, step: int | None) -> Path:
        return self.folder / ("model" if step is None else f"{step:09d}")

    def row_folder(self, row: BenchmarkRow) -> Path:
        return self.step_folder(row.step) / row.benchmark

    def finished(self, step: int) -> list[BenchmarkRow]:
        """Return the rows of a step that this process or an earlier one of the run completed."""
        return [row for row in read_scored_rows(self.rows_file) if row.step == step and row.status == "completed"]

    def submit(self, model: str, step: int | None = None, revision: str | None = None) -> None:
        """Queue the benchmarks of a model, a folder or a Hub id, but those that have their scores at this step."""
        if revision is None and Path(model).exists():
            model = str(Path(model).resolve())  # a job has a working directory of its own
        self.submitted_steps.add(step)
        for benchmark in self.missing(step):
            row = BenchmarkRow(step, benchmark.stem, model, revision)
            self.unfinished.append((row, self.pool.apply_async(self._run, (benchmark, row))))

    def missing(self, step: int | None) -> list[Path]:
        """Return the benchmarks that have no scores at a step."""
        finished = set() if step is None else {row.benchmark for row in self.finished(step)}
        return [benchmark for benchmark in self.benchmarks if benchmark.stem not in finished]

    def poll(self) -> list[BenchmarkRow]:
        """Return the rows of what has ended since the last call, written to the file."""
        rows = []
        for row, result in list(self.unfinished):
            if result.ready():
                result.get()  # raises what the thread raised
                self.unfinished.remove((row, result))
                rows.append(row)
                if row.status != "completed":
                    logger.warning("Benchmark %s of %s %s:\n%s", row.benchmark, row.model, row.status, row.error)
        write_scored_rows(self.rows_file, rows)
        return rows

    def wait(self) -> list[BenchmarkRow]:
        """Wait until nothing is left to run; return the rows."""
        for row, result in self.unfinished:
            start = time.monotonic()
            while not result.ready():
                seconds, log = time.monotonic() - start, self.row_folder(row) / LOG
                logger.info("%s runs on %s, for %d s so far. Its log is %s.", row.benchmark, row.model, seconds, log)
                result.wait(60)
        return self.poll()

    def run(self, model: str, revision: str | None = None) -> list[BenchmarkRow]:
        """Run the benchmarks of any model, a folder or a Hub id, to their end; return the rows, whose step is None."""
        self.submit(model, revision=revision)
        return self.wait()

    def _run(self, benchmark: Path, row: BenchmarkRow) -> None:
        folder, device = self.row_folder(row), self.free_devices.get()
        timeout: float | None = self.timeout
        log, start = folder / LOG, time.monotonic()
        merges = has_larger_vocabulary(row.model)
        model = str(folder / "merged") if merges else row.model
        command = lm_eval_command(benchmark, model, folder, row.revision)
        if self.launcher == "slurm":
            command, timeout = sbatch_command(command, f"benchmark-{row.benchmark}-{row.step}", log, self.timeout), None
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            # In the process group of the training, so that what ends the training ends the benchmark
            with log.open("ab") as stream:
                run = partial(subprocess.run, stdout=stream, stderr=subprocess.STDOUT)
                if merges:
                    run(merge_command(row.model, folder / "merged"), env=without_launcher(os.environ, device))
                done = run(command, cwd=benchmark.parent, env=without_launcher(os.environ, device), timeout=timeout)
            try:
                row.scores, row.stderr = read_scores(folder, benchmark_tasks(benchmark))
            except FileNotFoundError:
                row.status, row.error = "failed", f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            row.status, row.error = "timed out", f"ran for more than {timeout} s"
        except OSError as error:  # a full disk
            row.status, row.error = "failed", str(error)
        finally:
            shutil.rmtree(folder / "merged", ignore_errors=True)
            self.free_devices.put(device)
        row.seconds = round(time.monotonic() - start, 1)
        if row.status != "completed":
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:] if log.exists() else []
            row.error = "\n".join([row.error, *tail])


class BenchmarkCallback(StagingCallback):
    """Runs benchmarks on each checkpoint; their scores go to the trackers at the checkpoint's step.

    `benchmark_schedule` is "after" training, "beside" it, or at each "evaluation", which then waits for the scores, so
    that `metric_for_best_model` can be one of them.

    Args:
        push: where checkpoints are pushed. Slurm jobs then load them from the Hub, except a checkpoint that could not
            be pushed, and an adapter, which lm-eval cannot load by revision: these come from a staged folder.
    """

    def __init__(self, trainer: TRLTrainer, push: PushToHubRevisionCallback | None = None):
        args, self.trainer = cast(CausalLMConfig, trainer.args), trainer
        is_slurm = args.benchmark_launcher == "slurm"
        self.push = push if is_slurm else None
        self.schedule = args.benchmark_schedule or ("beside" if is_slurm or args.benchmark_devices else "after")
        if args.benchmark_schedule is None and is_benchmark(args.metric_for_best_model):
            self.schedule = "evaluation"
        benchmarks = [find_benchmark(name) for name in args.benchmarks]
        how = (args.benchmark_launcher, args.benchmark_devices, args.benchmark_timeout)
        self.jobs = BenchmarkJobs(Path(args.output_dir), benchmarks, *how)
        self.evaluated_step: int | None = None
        # Steps whose jobs wait for the end of training or for their push; first what an earlier process left
        self.held: set[int] = set()
        if trainer.is_world_process_zero():
            for leftover in self.jobs.folder.glob("*/.model-*"):  # of a staging that was cut off
                shutil.rmtree(leftover)
            self.held = self._staged_steps()
        if self.schedule == "beside":
            self._submit_held(is_last=True)

    @staticmethod
    def validate(args: CausalLMConfig) -> None:
        """Raise a ValueError for an unknown benchmark, a best model by a score that none has, Slurm without sbatch."""
        tasks = [task for name in args.benchmarks for task in benchmark_tasks(find_benchmark(name))]
        best, prefixes = args.metric_for_best_model, tuple(f"bench_{task}_" for task in tasks)
        if best is not None and is_benchmark(best) and not best.removeprefix("eval_").startswith(prefixes):
            raise ValueError(
                f"`metric_for_best_model` is {best}, but the benchmarks have the tasks {', '.join(tasks) or '(none)'}. "
                "Set it to eval_bench_<task>_<metric>."
            )
        if args.benchmarks and args.benchmark_launcher == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("`benchmark_launcher: slurm`: there is no sbatch on this machine. Set it to local.")

    def on_evaluate(self, args: RunConfig, state: TrainerState, control: object, metrics: Metrics, **_: object) -> None:  # type: ignore[override]
        step = state.global_step
        if self.schedule != "evaluation" or step == self.evaluated_step:
            return
        self.evaluated_step = step
        self.trainer.save_model(str(self._staged(step)), _internal_call=True)
        if state.is_world_process_zero:
            self.held.discard(step)
            self._submit(step)
        busy, scores = True, Metrics()
        while busy:  # Ranks meet every second: one that waited in a collective for the whole benchmark would time out.
            time.sleep(1)
            message: list[tuple[bool, Metrics] | None] = [None]
            if state.is_world_process_zero:
                self._poll()
                for row in self.jobs.finished(step):
                    scores |= row.tracker_scores()
                message = [(bool(self.jobs.unfinished), scores)]
            [(busy, scores)] = broadcast_object_list(message)
        metrics |= scores
        best = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if best not in metrics:
            logger.warning("There is no %s at step %d, so this checkpoint cannot be the best.", best, step)
            metrics[best] = float("nan")

    def owes(self, checkpoint: Path) -> bool:
        step = step_of(checkpoint)
        is_queued = step in self.held or step in self.jobs.submitted_steps
        return self.schedule != "evaluation" and not is_queued and bool(self.jobs.missing(step))

    def stage(self, checkpoint: Path) -> None:
        step = step_of(checkpoint)
        shutil.rmtree(self._staged(step), ignore_errors=True)
        stage_model(checkpoint, self._staged(step))
        self.held.add(step)

    def settle(self, output_dir: Path, state: TrainerState) -> None:
        super().settle(output_dir, state)
        if self.schedule == "beside" and state.is_world_process_zero:
            self._submit_held()

    def on_step_end(self, args: RunConfig, state: TrainerState, control: object, **kwargs: object) -> None:  # type: ignore[override]
        if self.schedule == "beside" and state.is_world_process_zero:
            self._poll()

    def finish(self, model_folder: Path) -> None:
        """Run what is left, and the benchmarks on the final model if its step was not saved; fill in its card."""
        state, args = self.trainer.state, self.trainer.args
        self.settle(Path(args.output_dir), state)
        best = state.best_global_step if args.load_best_model_at_end else None
        step = state.global_step if best is None else best
        if self.push:
            self.push.uploads.wait()
        self._submit_held(is_last=True)
        if step not in self.jobs.unfinished_steps:
            self.jobs.submit(str(model_folder), step)
        while self.jobs.unfinished:
            self._poll()
            time.sleep(0.5)
        self._delete_staged()
        name = args.hub_model_id or Path(args.output_dir).name
        with optional("the scores in the model card"):
            add_scores_to_card(model_folder / "README.md", read_scored_rows(self.jobs.rows_file), name, step)

    def _staged(self, step: int) -> Path:
        return self.jobs.step_folder(step) / "model"

    def _staged_steps(self) -> set[int]:
        return {int(folder.parent.name) for folder in self.jobs.folder.glob("[0-9]*/model")}

    def _delete_staged(self) -> None:
        for step in self._staged_steps() - {*self.held, *self.jobs.unfinished_steps}:
            delete_folder(self._staged(step))

    def _submit(self, step: int, revision: str | None = None) -> None:
        self.jobs.submit(self.trainer.args.hub_model_id if revision else str(self._staged(step)), step, revision)

    def _submit_held(self, is_last: bool = False) -> None:
        for step in sorted(self.held):
            revision = step_revision(self.trainer.args.hub_revision or "", step)
            is_adapter = base_model(self._staged(step)) is not None
            uploads = None if self.push is None or is_adapter else self.push.uploads
            if uploads and revision in uploads.pushed:
                self._submit(step, revision)
            elif not uploads or is_last or revision in uploads.refused:
                self._submit(step)
            else:
                continue
            self.held.remove(step)

    def _poll(self) -> None:
        self._submit_held()
        rows = self.jobs.poll()
        for row in rows:
            if row.scores and row.step is not None:
                log_at_step(self.trainer, row.tracker_scores(), row.step)
        if rows:
            self._delete_staged()
