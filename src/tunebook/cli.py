"""tunebook: what belongs to a run but is not training."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from .recipe import RecipeError, report_mistakes

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("tunebook").setLevel(logging.INFO)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    base: Annotated[str | None, typer.Option(help="Base model. Default: what the adapter was trained on.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Merge an adapter into its base model and verify the outputs; causal LMs and reward models."""
    from .merge import merge

    with report_mistakes():
        merge(adapter, out, base, dtype)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Reward model: folder or Hub id.")],
    file: Annotated[str, typer.Argument(help="Rows of messages, prompt and completion, or text.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write.")] = Path("rewards.jsonl"),
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 8,
) -> None:
    """Write the reward of each row, raw and (for a calibrated model) normalized."""
    from .rewards import score_file

    with report_mistakes():
        score_file(model, file, out, batch_size)


@app.command()
def push(run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).")]) -> None:
    """Push the models that a run could not push."""
    from huggingface_hub import HfApi

    from .hub import push_staged

    with report_mistakes():
        if report := push_staged(HfApi(), run):
            raise RecipeError(report)


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="Folder or Hub id; a base model too.")],
    benchmarks: Annotated[list[str], typer.Option(help="Names in configs/benchmarks, or paths. Repeat for several.")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")] = Path("benchmarks"),
    compare_to: Annotated[str | None, typer.Option(help="Another model; the difference to it is shown.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub model.")] = None,
    devices: Annotated[list[str] | None, typer.Option(help="CUDA_VISIBLE_DEVICES of each job at a time.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each benchmark.")] = 7200,
) -> None:
    """Run benchmarks on any model and show the scores."""
    from rich.console import Console

    from .benchmarks import find_benchmark, run_benchmarks
    from .scores import scores_table

    with report_mistakes():
        try:
            paths = [find_benchmark(name) for name in benchmarks]
        except ValueError as error:
            raise RecipeError(str(error)) from error
        options = {"devices": devices or [], "timeout": timeout}
        rows = run_benchmarks(model, paths, out / "model", revision=revision, **options)
        others = run_benchmarks(compare_to, paths, out / "compare_to", **options) if compare_to else []
        Console().print(scores_table(rows, others, title=model, other_title=compare_to or ""))
        if any(row["status"] != "completed" for row in rows):
            raise typer.Exit(1)
