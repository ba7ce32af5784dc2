"""What happens at a save, at an evaluation and after training: pushes to the Hub, benchmarks, generations.

Each callback refuses its own keys (`validate`, before rows and weights) and is built from them (`from_args`).
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback

from ..files import read_rows
from ..recipe.configs import CausalLMConfig, RewardConfig, RunConfig, ScriptArguments
from .benchmarks import BenchmarkJobs, find_benchmark, is_benchmark_metric
from .generations import GenerationCallback, Prompt, import_object
from .hub import PENDING, Uploads, check_hub_revision, stage_model, step_revision
from .pairs import PairAccuracyCallback
from .scores import add_scores_to_card, tracker_scores
from .trackers import log_at_step

logger = get_logger(__name__)


class PushToHubRevisionCallback(TrainerCallback):
    """Pushes each checkpoint to `<revision>-step-<step>`, and the final model to `revision` and, if asked, main.

    Args:
        on_failure: "warn", or "raise": a push that the Hub refuses ends the run at the next save, once that checkpoint
            is staged; one that could not be made by the end of the run makes it fail.
    """

    def __init__(
        self,
        uploads: Uploads,
        repo_id: str,
        revision: str,
        *,
        private: bool | None,
        on_failure: str,
        push_to_main: bool,
    ):
        self.uploads, self.repo_id, self.private, self.on_failure = uploads, repo_id, private, on_failure
        self.revision = revision
        self.final_revisions = sorted({revision, "main"} if push_to_main else {revision})

    @classmethod
    def validate(cls, args: RunConfig, resumes: bool) -> None:
        """Refuse a Hub revision that may not be written, and to bury what an earlier run could not push.

        Raises:
            ValueError: see [`check_hub_revision`].
            ConnectionError: see [`check_hub_revision`].
        """
        if not args.push_to_hub_revision or resumes or not PartialState().is_main_process:
            return
        output_dir = Path(args.output_dir)
        if any((output_dir / PENDING).glob("*")):
            raise ValueError(
                f"{output_dir} holds models of an earlier run that are not on the Hub. Push them (tunebook push "
                f"{output_dir}), remove {output_dir / PENDING}, or take another output_dir."
            )
        check_hub_revision(
            HfApi(),
            args.hub_model_id,
            args.hub_revision,
            push_to_main=args.hub_push_to_main,
            private=args.hub_private_repo,
            overwrite=args.overwrite_hub_revision,
            must_reach=args.hub_push_failure == "raise",
        )

    @classmethod
    def from_args(cls, args: RunConfig) -> "PushToHubRevisionCallback":
        return cls(
            Uploads(HfApi(), Path(args.output_dir)),
            args.hub_model_id,
            args.hub_revision,
            private=args.hub_private_repo is not False,
            on_failure=args.hub_push_failure,
            push_to_main=args.hub_push_to_main,
        )

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        message = f"Checkpoint at step {state.global_step}"
        self.uploads.submit(
            checkpoint, self.repo_id, step_revision(self.revision, state.global_step), message, self.private
        )
        if self.on_failure == "raise" and self.uploads.refused:
            raise RuntimeError(self.uploads.report())

    def submit_final(self, model_folder: Path) -> None:
        for revision in self.final_revisions:
            self.uploads.submit(model_folder, self.repo_id, revision, "Final model", self.private)

    def finish(self) -> None:
        self.uploads.wait()
        self.uploads.close()
        if report := self.uploads.report():
            if self.on_failure == "raise":
                raise RuntimeError(report)
            logger.warning(report)


class BenchmarkCallback(TrainerCallback):
    """Runs benchmarks on each checkpoint; their scores go to the trackers at the checkpoint's step.

    Args:
        schedule: "after" training, "beside" it, or at each "evaluation", which then waits for them: so that
            metric_for_best_model can be a score.
        push: where checkpoints are pushed; given when the jobs are to load them from the Hub. A checkpoint that could
            not be pushed is loaded from its staged folder; so is an adapter, as lm-eval cannot load one by revision.
    """

    def __init__(
        self,
        trainer: Trainer,
        jobs: BenchmarkJobs,
        benchmarks: Sequence[Path],
        schedule: str,
        push: PushToHubRevisionCallback | None = None,
    ):
        self.trainer, self.jobs, self.benchmarks, self.schedule, self.push = trainer, jobs, benchmarks, schedule, push
        self.unsubmitted: list[int] = []  # steps that wait for their push
        self.evaluated_step: int | None = None
        if trainer.is_world_process_zero():
            for folder in sorted(jobs.folder.glob("*/model")):  # what an earlier process of this run did not get to
                self._submit(int(folder.parent.name), revision=None)

    @classmethod
    def validate(cls, args: CausalLMConfig) -> None:
        """Refuse benchmarks that do not exist, a best model by a score that they do not have, and Slurm without sbatch.

        Raises:
            ValueError: naming the key and what to set.
        """
        is_benchmark_metric(args.metric_for_best_model, list(map(find_benchmark, args.benchmarks)))
        if args.benchmarks and args.benchmark_launcher == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("`benchmark_launcher: slurm`: there is no sbatch on this machine. Set it to local.")

    @classmethod
    def from_args(cls, trainer: Trainer, push: PushToHubRevisionCallback | None) -> "BenchmarkCallback":
        args = trainer.args
        benchmarks, slurm = list(map(find_benchmark, args.benchmarks)), args.benchmark_launcher == "slurm"
        schedule = "beside" if slurm or args.benchmark_devices else "after"
        if is_benchmark_metric(args.metric_for_best_model, benchmarks):
            schedule = "evaluation"
        jobs = BenchmarkJobs(
            Path(args.output_dir), args.benchmark_launcher, args.benchmark_devices, args.benchmark_timeout
        )
        return cls(trainer, jobs, benchmarks, args.benchmark_schedule or schedule, push if slurm else None)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.schedule != "evaluation" or state.global_step == self.evaluated_step:
            return
        self.evaluated_step = state.global_step
        folder = self._staged(state.global_step)
        self.trainer.save_model(str(folder), _internal_call=True)
        if state.is_world_process_zero:
            self._submit(state.global_step, revision=None)
        scores: dict[str, float] = {}
        if state.is_world_process_zero:  # what an earlier process of this run has measured at this step
            for row in read_rows(self.jobs.rows_file):
                if row["step"] == state.global_step and row["status"] == "completed":
                    scores |= tracker_scores(row)
        busy = True
        while busy:  # Ranks meet every second: one that waited in a collective for the whole benchmark would time out.
            time.sleep(1)
            message = [None]
            if state.is_world_process_zero:
                for row in self._poll():
                    scores |= tracker_scores(row)
                message = [(bool(self.jobs.unfinished_steps), scores)]
            [(busy, scores)] = broadcast_object_list(message)
        metrics |= scores
        best = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if best not in metrics:
            logger.warning(f"There is no {best} at step {state.global_step}: it cannot be the best")
            metrics[best] = float("nan")

    def on_save(self, args, state, control, **kwargs):
        if self.schedule == "evaluation" or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.rmtree(self._staged(state.global_step), ignore_errors=True)
        stage_model(checkpoint, self._staged(state.global_step))
        if self.push and not (checkpoint / "adapter_config.json").exists():
            self.unsubmitted.append(state.global_step)
        else:
            self._submit(state.global_step, revision=None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.schedule == "beside" and state.is_world_process_zero:
            self._poll()

    def finish(self, model_folder: Path) -> None:
        """Run what is left, and the benchmarks on the final model if its step was not saved; fill in its card."""
        state, args = self.trainer.state, self.trainer.args
        step = state.best_global_step if args.load_best_model_at_end else state.global_step
        if self.push:
            self.push.uploads.wait()
        self._submit_pushed(is_last=True)
        if step not in self.jobs.unfinished_steps:
            for benchmark in self.benchmarks:
                self.jobs.submit(benchmark, str(model_folder), step)
        while self.jobs.unfinished_steps:
            self._poll()
            time.sleep(0.5)
        self._delete_staged()
        name = args.hub_model_id or Path(args.output_dir).name
        add_scores_to_card(model_folder / "README.md", read_rows(self.jobs.rows_file), name, step)

    def _staged(self, step: int) -> Path:
        return self.jobs.step_folder(step) / "model"

    def _submit(self, step: int, revision: str | None) -> None:
        model = self.push.repo_id if revision else str(self._staged(step))
        for benchmark in self.benchmarks:
            self.jobs.submit(benchmark, model, step, revision)

    def _submit_pushed(self, is_last: bool = False) -> None:
        for step in list(self.unsubmitted):
            revision = step_revision(self.push.revision, step)
            if revision in self.push.uploads.pushed:
                self._submit(step, revision)
            elif is_last or revision in self.push.uploads.refused:
                self._submit(step, revision=None)
            else:
                continue
            self.unsubmitted.remove(step)

    def _poll(self) -> list[dict]:
        self._submit_pushed()
        rows = self.jobs.poll()
        for row in rows:
            if row["scores"]:
                log_at_step(self.trainer, tracker_scores(row), row["step"])
        if rows:
            self._delete_staged()
        return rows

    def _delete_staged(self) -> None:
        for folder in self.jobs.folder.glob("*/model"):
            if int(folder.parent.name) not in {*self.unsubmitted, *self.jobs.unfinished_steps}:
                shutil.rmtree(folder)


def load_callbacks(names: Sequence[str]) -> list[TrainerCallback]:
    """Build the user's own callbacks, each `module:Class`, without arguments.

    Raises:
        ValueError: one cannot be imported, or is not the class of a TrainerCallback.
    """
    classes = {name: import_object("callbacks", name) for name in names}
    for name, cls in classes.items():
        if not (isinstance(cls, type) and issubclass(cls, TrainerCallback)):
            raise ValueError(f"`callbacks`: {name} is not the class of a TrainerCallback.")
    return [cls() for cls in classes.values()]


def validate_callbacks(args: RunConfig, resumes: bool) -> None:
    """Refuse what the callbacks of a recipe cannot do, before rows and weights.

    Raises:
        ValueError: naming the key and what to set.
        ConnectionError: the Hub cannot be reached, and hub_push_failure is "raise".
    """
    load_callbacks(args.callbacks)
    PushToHubRevisionCallback.validate(args, resumes)
    if isinstance(args, RewardConfig):
        PairAccuracyCallback.validate(args)
    if isinstance(args, CausalLMConfig):
        BenchmarkCallback.validate(args)
        GenerationCallback.validate(args)


def build_callbacks(trainer: Trainer, script: ScriptArguments, prompts: Sequence[Prompt] = ()) -> list[TrainerCallback]:
    """Build the callbacks that a recipe asks for, in the order in which they are to be added and finished.

    They are built on every process; the Hub and benchmark jobs belong to the main one.

    Args:
        prompts: what `eval_prompts` names, loaded.
    """
    args, callbacks = trainer.args, []
    push = None
    if args.push_to_hub_revision and trainer.is_world_process_zero():
        push = PushToHubRevisionCallback.from_args(args)
    if isinstance(args, CausalLMConfig) and args.benchmarks:
        callbacks.append(BenchmarkCallback.from_args(trainer, push))
    if push:
        callbacks.append(push)
    if prompts:
        callbacks.append(GenerationCallback.from_args(trainer, script, prompts))
    if isinstance(args, RewardConfig) and args.pair_benchmarks:
        callbacks.append(PairAccuracyCallback.from_args(trainer, script))
    return callbacks + load_callbacks(args.callbacks)


def finish_callbacks(trainer: Trainer, callbacks: Sequence[TrainerCallback], model_folder: Path) -> None:
    """The last thing that a run does, once the final model and its card are in `model_folder`: push it, wait for the
    benchmarks, push it with their scores in its card, wait for the Hub and say what it does not have.

    The main process alone has anything to wait for, so no collective operation may come after this.

    Raises:
        RuntimeError: something was not pushed, and hub_push_failure is "raise".
    """
    if not trainer.is_world_process_zero():
        return
    pushes = [callback for callback in callbacks if isinstance(callback, PushToHubRevisionCallback)]
    for push in pushes:
        push.submit_final(model_folder)
    for callback in callbacks:
        if isinstance(callback, BenchmarkCallback):
            callback.finish(model_folder)
            for push in pushes:
                push.submit_final(model_folder)
    for push in pushes:
        push.finish()
