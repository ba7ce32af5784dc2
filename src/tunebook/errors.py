"""A user's mistake, and how it is shown: one message, no traceback, an exit code."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from . import environment

logger = logging.getLogger(__name__)


class RecipeError(ValueError):
    """A mistake that the user can correct. The scripts print it without a traceback and exit with `exit_code`."""

    exit_code = 2


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn a ValueError raised inside, and each of `errors`, into a [`RecipeError`] with the same message."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, *errors) as error:
        raise RecipeError(str(error)) from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one message and the error's exit code when a [`RecipeError`] is raised inside.

    With `log_level: debug` in the recipe, or TUNEBOOK_LOG_LEVEL=debug, the traceback precedes the message; the latter
    also shows the FutureWarnings of TRL and transformers, which only we can act on. Under several processes rank 0
    speaks. The others wait, since the launcher ends all processes with the first one that fails, and speak only when
    rank 0 found nothing wrong.
    """
    if environment.shows_tracebacks():
        logging.getLogger("tunebook").setLevel(logging.DEBUG)
    else:
        warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
        if environment.rank() > 0:
            logging.getLogger("tunebook").setLevel(logging.ERROR)
    try:
        yield
    except RecipeError as error:
        if environment.rank() > 0:
            time.sleep(30)
        if logger.isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        sys.stderr.flush()
        os._exit(error.exit_code)  # a normal exit would wait for the other ranks in torch.distributed's clean-up
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command resumes from the last complete checkpoint.\n")
        sys.stderr.flush()
        os._exit(130)
