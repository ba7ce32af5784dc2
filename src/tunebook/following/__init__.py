"""What happens at a save, at an evaluation and at the end of a run.

In: the trainer, its arguments, a checkpoint's folder. Out: Hub revisions, scores, generations, a report. Imports
packing, data, recipe and what is above them.
"""

from .callbacks import build_callbacks, finish_callbacks, validate_callbacks
from .report import report_run

__all__ = ["build_callbacks", "finish_callbacks", "report_run", "validate_callbacks"]
