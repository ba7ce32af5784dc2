"""One run at a time in an output_dir, and how it ends when a signal tells it to."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import LeaseCompromise, SoftFileLease, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints import resume_point, saving
from ..errors import Interrupted, RecipeError, interrupt, user_errors
from ..files import check_output
from .resume import RunMixin

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOCK = ".lock"
SILENCE = 300.0  # seconds without a refresh, after which a lock is taken
REFRESH = 5.0  # seconds


def from_main_process(function: Callable[[], T]) -> T:
    """Call a function on the main process; return its result, or raise its RecipeError, on every process."""
    outcome: list[T | RecipeError | None] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [function()]
        except RecipeError as error:
            outcome = [error]
    [result] = broadcast_object_list(outcome)
    if isinstance(result, RecipeError):
        raise result
    return result


def acquire(lock: SoftFileLease) -> None:
    """Take a lock that nobody holds, whose process is dead on this host, or that is not refreshed any more.

    Raises:
        RecipeError: a process refreshes it.
    """
    path, owner, seen = Path(lock.lock_file), lock.owner, []

    def is_refreshed() -> bool:
        if path.exists():
            seen.append(path.stat().st_mtime_ns)
        if owner and len(seen) == 20 * REFRESH:
            text = "%s is locked by process %d on %s. The lock is taken if it is not refreshed for %d s."
            logger.warning(text, path.parent, owner.pid, owner.hostname, SILENCE)
        return len(set(seen)) > 1

    try:
        lock.acquire(timeout=2 * SILENCE, poll_interval=0.2, cancel_check=is_refreshed)
    except Timeout:
        owner = lock.owner or owner
        process = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        raise RecipeError(
            f"{path.parent} is in use by {process}. Wait for its end, end it, or set another `output_dir`. If there is "
            f"no such process, remove {path}."
        ) from None
    if owner:
        text = "Process %d on %s did not end its run in %s as it should. Its lock is taken."
        logger.warning(text, owner.pid, owner.hostname, path.parent)


def give_up(loss: LeaseCompromise) -> None:
    """Interrupt this process, whose lock another one has taken."""
    if loss.reason == "owner-changed":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        logger.warning("The lock %s cannot be refreshed: %s.", loss.lock_file, loss.error or loss.reason)


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this launch alone; its main process refreshes the lock.

    Raises:
        RecipeError: another process holds it, or takes it because this one was silent for too long.
        Interrupted: a signal came; says what is whole.
    """
    check_output(output_dir, "`output_dir`", folder=True)
    with user_errors(OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        lease = partial(SoftFileLease, lease_duration=SILENCE, heartbeat_interval=REFRESH, thread_local=False)
        lock = lease(output_dir / LOCK, on_compromise=give_up)
        with saving("The lock", output_dir):
            from_main_process(lambda: acquire(lock))
    try:
        with saving("A file", output_dir):
            yield
    except KeyboardInterrupt as error:
        if lock.compromise:
            raise RecipeError(f"{output_dir} was taken by another run: this one had not refreshed its lock.") from error
        if isinstance(error, Interrupted):
            error.outlook = error.outlook or resume_point(output_dir)
        raise
    finally:
        lock.release()


class SigtermCallback(TrainerCallback):
    """Ends training at SIGTERM with a checkpoint after the step in hand: all processes at the same step, whichever got
    the signal. Only where the scripts handle it."""

    def __init__(self, trainer: RunMixin):
        self.trainer, self.is_told, self.ends, self.saved_step = trainer, False, False, 0
        self.is_handling = signal.getsignal(signal.SIGTERM) is interrupt

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.is_handling:
            signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number: int, frame: object) -> None:
        self.is_told = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        accelerator = self.trainer.accelerator
        if self.is_told:
            accelerator.set_trigger()
        if self.is_handling and accelerator.check_trigger():
            self.ends = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.saved_step = state.global_step
        if self.ends:
            raise Interrupted(signal.SIGTERM)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.on_step_end(args, state, control)  # the signal may have come in the last step's evaluation
        if self.is_handling:
            signal.signal(signal.SIGTERM, interrupt)
        if self.ends:
            if self.saved_step != state.global_step and not args.load_best_model_at_end:
                self.trainer._save_checkpoint(self.trainer.model, None)
            raise Interrupted(signal.SIGTERM)
