"""tunebook: what belongs to a run but is not training."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError, exit_on_error, user_errors
from ..recipe import Recipe, find_task, parse, read_command_line, read_recipe

# Options that typer does not know are keys of the recipe
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def parse_recipe(path: Path, task: str | None, words: list[str]) -> Recipe:
    config, overrides = read_command_line(words)
    if config is not None:
        raise RecipeError(f"--config {config}: the recipe is the first argument, {path}.")
    return parse(find_task(path, task), read_recipe(path), overrides)


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

    with exit_on_error():
        merge(adapter, out, base, dtype)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Reward model: folder or Hub id.")],
    file: Annotated[str, typer.Argument(help="Rows of messages, prompt and completion, or text.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write.")] = Path("rewards.jsonl"),
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 8,
) -> None:
    """Write the reward of each row, raw and (for a calibrated model) normalized."""
    from .score import score_file

    with exit_on_error():
        score_file(model, file, out, batch_size)


@app.command()
def push(run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).")]) -> None:
    """Push the models that a run could not push."""
    from huggingface_hub import HfApi

    from ..following.hub import push_staged

    with exit_on_error():
        if report := push_staged(HfApi(), run):
            raise RecipeError(report)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (their output_dir).")],
    out: Annotated[
        Path | None, typer.Option(help="Page to write. Default: report.html, of one run in its folder.")
    ] = None,
) -> None:
    """Write a run, or several on the same axes, as a page: curves, generations, recipe, data."""
    from ..following.report import REPORT, write_report

    out = out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    with exit_on_error(), user_errors(OSError):
        write_report(runs, out)


@app.command(context_settings=OVERRIDES)
def preview(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe; behind it --key value overrides its keys.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 5,
    task: Annotated[str | None, typer.Option(help="sft, rm or dpo. Default: as the recipe's path says.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page, instead of the terminal.")] = None,
) -> None:
    """Show rows as the model sees them: what is trained, what is only read, what was cut."""
    from rich.console import Console

    from .preview import html_page, preview_rows, print_rows

    with exit_on_error():
        shown, report = preview_rows(parse_recipe(recipe, task, context.args), rows)
        if html is None:
            print_rows(shown, report, Console())
        else:
            page = html_page(shown, report, str(recipe))
            with user_errors(OSError):
                html.write_text(page, encoding="utf-8")


@app.command(context_settings=OVERRIDES)
def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe; behind it --key value overrides its keys.")],
    task: Annotated[str | None, typer.Option(help="sft, rm or dpo. Default: as the recipe's path says.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, h100-80gb, NAME-<N>gb, ... Default: this machine's.")] = None,
    accelerate_config: Annotated[str | None, typer.Option(help="File, or name in configs/accelerate.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Default: the accelerate config's, else 1.")] = None,
    full: Annotated[bool, typer.Option(help="Tokenize every row, not a sample.")] = False,
    reward_model: Annotated[
        str | None, typer.Option(help="Folder of a model that judges chosen against rejected.")
    ] = None,
) -> None:
    """Say what a run would do, whether it fits, and what is wrong with it, without weights and without a GPU."""
    from .check import check, read_sharding

    with exit_on_error():
        sharding = read_sharding(accelerate_config, num_processes)
        raise typer.Exit(check(parse_recipe(recipe, task, context.args), device, sharding, full, reward_model))


@app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="A recipe (.yaml), an OpenRLHF command, or a script with one.")],
    out: Annotated[Path | None, typer.Option(help="Recipe to write; must not exist. Default: the terminal.")] = None,
    task: Annotated[str | None, typer.Option(help="sft, rm or dpo. Default: as the path or the command says.")] = None,
) -> None:
    """Turn Open-R1's, the alignment-handbook's and OpenRLHF's settings into a recipe."""
    from .migrate import migrate

    with exit_on_error():
        if out is not None and out.exists():
            raise RecipeError(f"--out {out} exists already.")
        done = migrate(source, task)
        if out is None:
            typer.echo(done, nl=False)
        else:
            with user_errors(OSError):
                out.write_text(str(done), encoding="utf-8")
        for line in done.remarks():
            typer.echo(line, err=True)


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

    from ..following.benchmarks import find_benchmark, run_benchmarks
    from ..following.scores import scores_table

    with exit_on_error():
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
