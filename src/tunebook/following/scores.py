"""Scores of benchmarks: rows of `benchmarks.jsonl`, names in trackers, tables, model cards; reward models' accuracy.

{"step": 10, "benchmark": "gsm8k", "model": ..., "revision": ..., "status": "completed", "seconds": 61.0,
 "scores": {task: {metric: value}}, "stderr": {task: {metric: value}}, "error": ""}
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from rich.table import Table

from ..files import markdown_table

ROWS_FILE = "benchmarks.jsonl"
REWARDS_FILE = "eval_rewards.csv"  # of the pairs of a reward model's last evaluation: chosen, rejected
CARD_HEADING = "## Benchmarks"


def tracker_scores(row: dict) -> dict[str, float]:
    """A row's scores as trackers and metric_for_best_model name them: eval_bench_<task>_<metric>."""
    return {f"eval_bench_{task}_{metric}": value for (task, metric), value in flat_scores([row]).items()}


def flat_scores(rows: Sequence[dict], key: str = "scores") -> dict[tuple[str, str], float]:
    """`{(task, metric): value}` over all rows; of a task that was run twice, the later value."""
    return {
        (task, metric): value for row in rows for task, scores in row[key].items() for metric, value in scores.items()
    }


def scores_table(
    rows: Sequence[dict], other_rows: Sequence[dict] = (), title: str = "", other_title: str = ""
) -> Table:
    """A rich table of one model's scores with their standard errors and, given another model's, the differences to it.

    A benchmark that failed is a row with its status; its error is in the row and in the log.
    """
    table = Table("task", "metric", title or "score")
    if other_rows:
        table.add_column(other_title or "other")
        table.add_column("difference")
    scores, stderr, others = flat_scores(rows), flat_scores(rows, "stderr"), flat_scores(other_rows)
    for (task, metric), value in scores.items():
        error = f" ± {stderr[task, metric]:.4f}" if (task, metric) in stderr else ""
        cells = [task, metric, f"{value:.4f}{error}"]
        if (task, metric) in others:
            cells += [f"{others[task, metric]:.4f}", f"{value - others[task, metric]:+.4f}"]
        table.add_row(*cells)
    for row in rows:
        if row["status"] != "completed":
            table.add_row(row["benchmark"], row["status"], row["error"].partition("\n")[0])
    return table


def add_scores_to_card(card_path: Path, rows: Sequence[dict], model_name: str, step: int) -> None:
    """Write benchmark rows into a model card: a table with a line a step, and as model-index the scores at `step`,
    those of the model that the card is for. What an earlier call wrote is replaced; the rest of the card is kept."""
    card = ModelCard(card_path.read_text() if card_path.exists() else "---\n---\n")
    rows = [row for row in rows if row["step"] is not None]  # the others are of other models
    steps = sorted({row["step"] for row in rows})
    by_step = {at: flat_scores([row for row in rows if row["step"] == at]) for at in steps}
    columns = sorted(flat_scores(rows))
    lines = [
        [at, *(f"{scores[column]:.4f}" if column in scores else "" for column in columns)]
        for at, scores in by_step.items()
    ]
    section = markdown_table(["step", *(f"{task} {metric}" for task, metric in columns)], lines)
    before, _, after = card.text.partition(f"{CARD_HEADING}\n")
    _, heading, rest = after.partition("\n## ")
    card.text = f"{before.rstrip()}\n\n{CARD_HEADING}\n\n{section}\n{heading}{rest}"
    card.data.model_name = model_name
    card.data.eval_results = [
        EvalResult("text-generation", dataset_type=task, dataset_name=task, metric_type=metric, metric_value=value)
        for (task, metric), value in sorted(by_step.get(step, {}).items())
    ]
    card.save(card_path)
