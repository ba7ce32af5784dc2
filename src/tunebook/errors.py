"""A user's mistake, and how it is shown: one message, no traceback, an exit code."""

import logging
import os
import re
import reprlib
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


LINE = 2000  # characters of a line of a message
PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)|([?&](?:\w*token|\w*key|password|sig|signature)=)[^&\s]+", re.I)
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 3, 150, 150


def mask(text: str) -> str:
    """Return text with the passwords and tokens in its addresses masked."""
    return PASSWORD.sub(r"\1\2***", text)


def plain(text: object, limit: int | None = None) -> str:
    """Return text that others may have written as a terminal and a file may hold it.

    Control characters are escaped, but for tabs and line breaks, and passwords in addresses are masked.

    Args:
        limit: characters to keep, half of them from the end. Default: all.
    """
    text = mask(str(text))
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]} [...] {text[-(limit // 2) :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def brief(value: object) -> str:
    """Return the representation of a value, of any size, in at most about 200 characters."""
    return plain(BRIEF.repr(value), 200)


class PlainFormatter(logging.Formatter):
    """Formats a record as a [`plain`] message."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(plain(line, LINE) for line in super().format(record).split("\n"))


def set_up_log() -> None:
    """Log messages, and nothing else, to stderr, unless a log is set up already. Where stderr is not a terminal, the
    libraries that load after this draw no bars."""
    if not sys.stderr.isatty():
        for name in (
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "HF_DATASETS_DISABLE_PROGRESS_BARS",
        ):  # transformers reads the first
            os.environ.setdefault(name, "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


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
def foreign(what: str, fault: str = "cannot be loaded") -> Iterator[None]:
    """Turn all that a library raises about what others wrote, a model's folder or a template, into one message.

    Raises:
        RecipeError: "<what> <fault>: <the first line of the error>".
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        said = str(error).strip() if isinstance(error, OSError | ValueError) else repr(error)
        raise RecipeError(f"{what} {fault}: {plain(said.partition(chr(10))[0], 500)}") from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one message and the error's exit code when a [`RecipeError`] is raised inside.

    With `log_level: debug` in the recipe, or TUNEBOOK_LOG_LEVEL=debug, the traceback precedes the message; the latter
    also shows the FutureWarnings of TRL and transformers, which only we can act on. Under several processes rank 0
    speaks. The others wait, since the launcher ends all processes with the first one that fails, and speak only when
    rank 0 found nothing wrong. Ctrl-C and SIGTERM end the process in the same way; see [`Interrupted`].
    """
    set_up_log()
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
        sys.stderr.write("".join(f"error: {plain(line, LINE)}\n" for line in str(error).splitlines()))
        sys.stderr.flush()
        os._exit(error.exit_code)  # a normal exit would wait for the other ranks in torch.distributed's clean-up
    except Interrupted as error:
        end_process(error.number, error=error)
