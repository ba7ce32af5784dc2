"""Scores of benchmarks: the rows of `benchmarks.jsonl`, their names in trackers, tables and model cards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from pydantic import TypeAdapter
from rich.table import Table

from ..checkpoints import optional
from ..files import append_rows, markdown_table, read_rows, terminal

ROWS_FILE = "benchmarks.jsonl"
REWARDS_FILE = "eval_rewards.csv"  # chosen and rejected reward of each pair in a reward model's last evaluation
CARD_HEADING = "## Benchmarks"

Metrics = dict[str, float]
Scores = dict[str, Metrics]  # {task: {metric: value}}


@dataclass
class BenchmarkRow:
    """One benchmark of one model: a line of `benchmarks.jsonl`."""

    step: int | None  # of the checkpoint; None for a model that this run did not train
    benchmark: str
    model: str
    revision: str | None = None
    status: str = "completed"  # or "failed", "timed out"
    seconds: float = 0.0
    scores: Scores = field(default_factory=dict)
    stderr: Scores = field(default_factory=dict)  # standard errors of the scores that have one
    error: str = ""  # what failed, and the end of the log

    def tracker_scores(self) -> dict[str, float]:
        """Return the scores as trackers and `metric_for_best_model` name them: eval_bench_<task>_<metric>."""
        return {f"eval_bench_{task}_{metric}": value for (task, metric), value in flatten([self.scores]).items()}


SCORED_ROW = TypeAdapter(BenchmarkRow)


def read_scored_rows(path: Path) -> list[BenchmarkRow]:
    """Read a `benchmarks.jsonl`; no rows where there is no file."""
    return read_rows(path, SCORED_ROW)


def write_scored_rows(path: Path, rows: Sequence[BenchmarkRow]) -> None:
    """Write rows to a `benchmarks.jsonl`, in the place of earlier ones of the same step and benchmark."""
    with optional(path.name):
        append_rows(path, [vars(row) for row in rows], "step", "benchmark", kind=SCORED_ROW)


def flatten(several: Iterable[Scores]) -> dict[tuple[str, str], float]:
    """Return `{(task, metric): value}`; the later value of a task that ran twice."""
    tasks = [item for scores in several for item in scores.items()]
    return {(task, metric): value for task, metrics in tasks for metric, value in metrics.items()}


def scores_table(
    rows: Sequence[BenchmarkRow], other_rows: Sequence[BenchmarkRow] = (), title: str = "", other_title: str = ""
) -> Table:
    """Return a rich table of a model's scores and standard errors and, given another model's, the differences to it.

    A benchmark that failed has a line with its status and the first line of its error.
    """
    table = Table("task", "metric", terminal(title) or "score")
    if other_rows:
        table.add_column(terminal(other_title) or "other")
        table.add_column("difference")
    scores, others = (flatten(row.scores for row in each) for each in (rows, other_rows))
    stderr = flatten(row.stderr for row in rows)
    for (task, metric), value in scores.items():
        error = f" ± {stderr[task, metric]:.4f}" if (task, metric) in stderr else ""
        cells = [terminal(task), terminal(metric), f"{value:.4f}{error}"]
        if (task, metric) in others:
            cells += [f"{others[task, metric]:.4f}", f"{value - others[task, metric]:+.4f}"]
        table.add_row(*cells)
    for row in rows:
        if row.status != "completed":
            table.add_row(terminal(row.benchmark), row.status, terminal(row.error.partition("\n")[0]))
    return table


def add_scores_to_card(card_path: Path, rows: Sequence[BenchmarkRow], model_name: str, step: int) -> None:
    """Write scores into a model card: a table with a line per step, and the scores at `step` as its model-index.

    `step` is that of the model that the card describes. A table that an earlier call wrote is replaced, and the rest
    of the card is kept.
    """
    card = ModelCard(card_path.read_text() if card_path.exists() else "---\n---\n")
    columns = sorted(flatten(row.scores for row in rows if row.step is not None))
    lines = []
    for at in sorted({row.step for row in rows if row.step is not None}):
        scores = flatten(row.scores for row in rows if row.step == at)
        lines.append([at, *(f"{scores[column]:.4f}" if column in scores else "" for column in columns)])
    section = markdown_table(["step", *(f"{task} {metric}" for task, metric in columns)], lines)
    before, _, after = card.text.partition(f"{CARD_HEADING}\n")
    _, heading, rest = after.partition("\n## ")
    card.text = f"{before.rstrip()}\n\n{CARD_HEADING}\n\n{section}\n{heading}{rest}"
    card.data["model_name"] = model_name
    card.data["eval_results"] = [
        EvalResult("text-generation", dataset_type=task, dataset_name=task, metric_type=metric, metric_value=value)
        for (task, metric), value in sorted(flatten(row.scores for row in rows if row.step == step).items())
    ]
    card.save(card_path)
