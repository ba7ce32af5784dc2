"""What happens at a save, at an evaluation and after training.

Each callback refuses what it cannot do (`validate`, before rows and weights) and reads its own keys. They stand in
`hub.py`, `benchmarks.py`, `generations.py` and `pairs.py`; here are the user's own, and what is done with all of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..packing.context_parallel import TRLTrainer
from ..recipe.configs import CausalLMConfig, RewardConfig, RunConfig, ScriptArguments
from .benchmarks import BenchmarkCallback
from .generations import GenerationCallback, Prompt, import_object
from .hub import PushToHubRevisionCallback
from .pairs import PairAccuracyCallback

logger = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback):
    """Ends training after `early_stopping_patience` evaluations in a row without a better metric.

    They are counted in the log, so a resumed run counts on, and one that has ended so trains nothing when it is started
    again. transformers' EarlyStoppingCallback counts from 0 at each start.
    """

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:  # type: ignore[override]
        if state.best_metric is not None:
            self.end_if_due(args, state, control)

    def on_evaluate(  # type: ignore[override]
        self, args: RunConfig, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: object
    ) -> None:
        value = metrics.get(f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}", np.nan)
        best = np.nan if state.best_metric is None else state.best_metric
        worse = np.less_equal if args.greater_is_better else np.greater_equal
        if np.isnan(value) or worse(value, best):  # the Trainer takes it for the best, or does not, after this
            self.end_if_due(args, state, control)
            control.should_save |= control.should_training_stop and args.save_strategy in ("steps", "epoch")

    def end_if_due(self, args: RunConfig, state: TrainerState, control: TrainerControl) -> None:
        best, patience = state.best_global_step, args.early_stopping_patience
        since = {entry["step"] for entry in state.log_history if "eval_runtime" in entry}
        since = {step for step in since if best is None or step > best}
        if patience and len(since) >= patience and not control.should_training_stop:
            control.should_training_stop = True
            text = "Training ends at step %d: %d evaluations in a row without a better %s than at step %s."
            logger.info(text, state.global_step, len(since), args.metric_for_best_model, best)


def import_callbacks(names: Sequence[str]) -> list[type[TrainerCallback]]:
    """Import the classes of the user's own callbacks, each `module:Class`.

    Raises:
        ValueError: one cannot be imported, or is not the class of a TrainerCallback.
    """
    classes: list[type[TrainerCallback]] = []
    for name in dict.fromkeys(names):
        cls = import_object("callbacks", name)
        if not (isinstance(cls, type) and issubclass(cls, TrainerCallback)):
            raise ValueError(f"`callbacks`: {name} is not the class of a TrainerCallback.")
        classes.append(cls)
    return classes


def validate_callbacks(args: RunConfig, resumes: bool) -> None:
    """Refuse what the callbacks of a recipe cannot do, before rows and weights.

    Raises:
        ValueError: naming the key and what to set.
        ConnectionError: the Hub cannot be reached, and hub_push_failure is "raise".
    """
    import_callbacks(args.callbacks)
    PushToHubRevisionCallback.validate(args, resumes)
    if isinstance(args, RewardConfig):
        PairAccuracyCallback.validate(args)
    if isinstance(args, CausalLMConfig):
        BenchmarkCallback.validate(args)
        GenerationCallback.validate(args)


def build_callbacks(
    trainer: TRLTrainer, script: ScriptArguments, prompts: Sequence[Prompt] = ()
) -> list[TrainerCallback]:
    """Build the callbacks that a recipe asks for, in the order in which they are to be added.

    They are built on every process, except the push to the Hub, which the main process alone has. `prompts` are those
    that `eval_prompts` names.
    """
    args = trainer.args
    callbacks: list[TrainerCallback] = []
    is_pushing = args.push_to_hub_revision and trainer.is_world_process_zero()
    push = PushToHubRevisionCallback(args) if is_pushing else None
    if isinstance(args, CausalLMConfig) and args.benchmarks:
        callbacks.append(BenchmarkCallback(trainer, push))
    if push:
        callbacks.append(push)
    if prompts:
        callbacks.append(GenerationCallback(trainer, script, prompts))
    if isinstance(args, RewardConfig) and args.pair_benchmarks:
        callbacks.append(PairAccuracyCallback(trainer, script))
    if args.early_stopping_patience:
        callbacks.append(EarlyStopping())
    return callbacks + [cls() for cls in import_callbacks(args.callbacks)]


def finish_callbacks(trainer: TRLTrainer, callbacks: Sequence[TrainerCallback], model_folder: Path) -> None:
    """Push the final model, wait for the benchmarks, push it with their scores in its card, and wait for the Hub.

    It is the last step of a run, once the final model and its card are in `model_folder`. The main process alone has
    anything to wait for, so no collective operation may come after it.

    Raises:
        NotPushedError: something was not pushed, and hub_push_failure is "raise".
    """
    if not trainer.is_world_process_zero():
        return
    pushes = [callback for callback in callbacks if isinstance(callback, PushToHubRevisionCallback)]
    benchmarks = [callback for callback in callbacks if isinstance(callback, BenchmarkCallback)]
    for push in pushes:
        push.settle(Path(trainer.args.output_dir), trainer.state)
        push.submit_final(model_folder)
    for benchmark in benchmarks:
        benchmark.finish(model_folder)
    for push in pushes:
        if benchmarks:
            push.submit_final(model_folder)
        push.finish(trainer.state)
