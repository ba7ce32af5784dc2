"""A user's mistake, and how it is shown: one message, no traceback, an exit code."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import environment

logger = logging.getLogger(__name__)


class RecipeError(ValueError):
    """A mistake that the user can correct. The scripts print it without a traceback and exit with `exit_code`."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """A signal ends the process. The scripts print it without a traceback and exit with 128 + `number`: 130 after
    Ctrl-C, 143 after SIGTERM.

    Args:
        number: of the signal.
        outlook: what is whole, and what the same command does, in words.
    """

    def __init__(self, number: int, outlook: str = ""):
        self.number, self.outlook = number, outlook

    def __str__(self) -> str:
        cause = "Interrupted" if self.number == signal.SIGINT else f"Ended by {signal.Signals(self.number).name}"
        return f"{cause}. {self.outlook}".rstrip()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising [`Interrupted`]."""
    raise Interrupted(number)


def end_process(number: int, frame: FrameType | None = None, error: Interrupted | None = None) -> None:
    """Handle a signal by ending the process with one message, of rank 0. What is open stays as it is."""
    if environment.rank() == 0:
        sys.stderr.write(f"{error or Interrupted(number)}\n")
        sys.stderr.flush()
    os._exit(128 + number)


def end_on_signals() -> None:
    """Have Ctrl-C and SIGTERM end the process with one message."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_process)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM raise [`Interrupted`] inside; in a thread other than the main one, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn a ValueError raised inside, and each of `errors`, into a [`RecipeError`] with the same message."""
    mistakes: tuple[type[Exception], ...] = (ValueError, *errors)
    try:
        yield
    except RecipeError:
        raise
    except mistakes as error:
        raise RecipeError(str(error)) from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one message and the error's exit code when a [`RecipeError`] is raised inside.

    With `log_level: debug` in the recipe, or TUNEBOOK_LOG_LEVEL=debug, the traceback precedes the message; the latter
    also shows the FutureWarnings of TRL and transformers, which only we can act on. Under several processes rank 0
    speaks. The others wait, since the launcher ends all processes with the first one that fails, and speak only when
    rank 0 found nothing wrong. Ctrl-C and SIGTERM end the process in the same way; see [`Interrupted`].
    """
    if environment.shows_tracebacks():
        logging.getLogger("tunebook").setLevel(logging.DEBUG)
    else:
        warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
        if environment.rank() > 0:
            logging.getLogger("tunebook").setLevel(logging.ERROR)
    try:
        with interrupted_by_signals():
            yield
    except RecipeError as error:
        if environment.rank() > 0:
            time.sleep(30)
        if logger.isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        sys.stderr.flush()
        os._exit(error.exit_code)  # a normal exit would wait for the other ranks in torch.distributed's clean-up
    except Interrupted as error:
        end_process(error.number, error=error)
