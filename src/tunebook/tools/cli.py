"""Train: sft, rm, dpo. Before: recipes, schema, migrate, preview, check.

After: chat, merge, score, benchmark, push, report."""

import json
import logging
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..errors import RecipeError, exit_on_error, user_errors
from ..files import check_output, shipped
from ..recipe.keys import TASK_NAMES, help_text, json_schema, saved_keys
from ..recipe.words import find_task, read_recipe, refuse_wrong_keys, split_flags

if TYPE_CHECKING:  # the recipe room loads torch, which `tunebook --help` need not wait for
    from ..recipe import Recipe

# Options that typer does not know are keys of the recipe
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipePath = Annotated[Path, typer.Argument(help="Recipe. Override its keys with --key value.")]
Task = Annotated[str | None, typer.Option(help="sft, rm or dpo. Default: the one that the path names.")]


class Commands(TyperGroup):
    """Log as the scripts do, and show a user's mistake in any command as one message."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override] # typer's own click
        logging.getLogger("tunebook").setLevel(logging.INFO)
        with exit_on_error():
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def parse_recipe(path: Path, task: str | None, words: list[str]) -> "Recipe":
    """Parse a recipe and the overrides behind it on the command line."""
    if config := split_flags(words).get("config"):
        raise RecipeError(f"--config {' '.join(config)}: the recipe is the first argument, {path}.")
    refuse_wrong_keys(find_task(path, task), ["--config", str(path), *words])
    from ..recipe import parse, read_command_line

    _, overrides = read_command_line(words)
    return parse(find_task(path, task), read_recipe(path), overrides)


def check_new(path: Path, name: str) -> None:
    """Refuse a file that exists, or that cannot be written; see [`check_output`]."""
    if path.exists():
        raise RecipeError(f"{name} {path} exists already. Name a new file.")
    check_output(path, name)


def write(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    with user_errors(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("tunebook"))
        raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def train(
    context: typer.Context,
    recipe: RecipePath,
    accelerate: Annotated[str | None, typer.Option(help="File, or name in configs/accelerate.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Processes on each node. Default: all GPUs.")] = None,
) -> None:
    task, words = str(context.info_name), ["--config", str(shipped(recipe)), *context.args]
    refuse_wrong_keys(task, words)
    from .launch import launch

    raise typer.Exit(launch(task, words, accelerate, num_processes))


for task in TASK_NAMES:
    help = f"Train: accelerate launch src/{task}.py --config RECIPE, on all devices of this machine."
    keys = f"tunebook schema {task} --text lists the keys of a recipe."
    app.command(task, context_settings=OVERRIDES, help=help, epilog=keys)(train)


@app.command()
def schema(
    task: Annotated[str, typer.Argument(help="sft, rm or dpo.")],
    text: Annotated[bool, typer.Option("--text", help="Show the keys as the script's --help does.")] = False,
) -> None:
    """Show the JSON schema of a task's recipe, by which editors complete and check its keys; or the keys as text."""
    keys = saved_keys()
    if task not in TASK_NAMES:
        raise RecipeError(f"{task} is not a task. Name one of {', '.join(TASK_NAMES)}.")
    if keys is None:
        from ..recipe.schema import list_keys

        keys = list_keys()
    typer.echo(help_text(task, keys) if text else json.dumps(json_schema(task, keys), indent=2))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy, such as qwen3-1.7b/sft/full.yaml.")] = None,
    out: Annotated[Path | None, typer.Argument(help="File to write. It must not exist. Default: shown here.")] = None,
) -> None:
    """List the recipes that are shipped, with their hardware; show or copy one."""
    folder = shipped("recipes")
    if name is None:
        for path in sorted(folder.rglob("*.yaml")):
            hardware = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# Hardware: ")
            typer.echo(f"{path.relative_to(folder).as_posix():32} {hardware}")
        return
    source = folder / name.removeprefix("recipes/")
    if not source.is_file():
        raise RecipeError(f"There is no recipe {name}. `tunebook recipes` lists them.")
    if out is None:
        typer.echo(source.read_text(encoding="utf-8"), nl=False)
        return
    check_new(out, "OUT")
    write(out, source.read_text(encoding="utf-8"))
    typer.echo(f"The recipe is in {out}.")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.")],
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one of the adapter's config.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the merged weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Merge the adapter of a causal LM or a reward model into its base model, and verify the outputs."""
    from .merge import merge

    check_output(out, "OUT", folder=True)
    merge(adapter, out, base, dtype)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a reward model.")],
    file: Annotated[str, typer.Argument(help="File of messages, of prompts and completions, or of text.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")] = Path("rewards.jsonl"),
    batch_size: Annotated[int, typer.Option(help="Rows per batch.")] = 8,
) -> None:
    """Write the reward of each row, raw and (for a calibrated model) normalized."""
    from .score import score_file

    check_output(out, "--out")
    score_file(model, file, out, batch_size)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model or adapter.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end. Default: talk, line by line.")] = None,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: no sampling. Default: the model's own.")] = None,
    revision: Annotated[str, typer.Option(help="Revision of a Hub model.")] = "main",
) -> None:
    """Talk with a model, trained or not, or with an adapter on its base model."""
    with redirect_stdout(sys.stderr):  # transformers prints when it is imported with WANDB_MODE=offline
        from .chat import chat

    heat = {} if temperature is None else {"temperature": temperature or None, "do_sample": temperature > 0}
    chat(model, prompt, system, revision, max_new_tokens=max_new_tokens, **heat)


@app.command()
def push(run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).")]) -> None:
    """Push the models that a run could not push."""
    from huggingface_hub import HfApi

    from ..following.hub import PENDING, Uploads
    from ..training import held

    if not (run / PENDING).is_dir():
        raise RecipeError(f"{run} has no models that wait for the Hub (no folder {PENDING}).")
    with held(run):
        report = Uploads(HfApi(), run).finish()
    if report:
        raise RecipeError(report)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (their output_dir).")],
    out: Annotated[Path | None, typer.Option(help="Page to write. Default: report.html, next to one run.")] = None,
) -> None:
    """Write a page about a run, or about several on the same axes: curves, generations, recipe, data."""
    from ..following.report import REPORT, write_report

    page = out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    check_output(page, "--out")
    with user_errors(OSError):
        write_report(runs, page)
    typer.echo(f"The page is in {page}.")


@app.command(context_settings=OVERRIDES)
def preview(
    context: typer.Context,
    recipe: RecipePath,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Number of rows to show.")] = 5,
    task: Task = None,
    html: Annotated[Path | None, typer.Option(help="Page to write instead of showing the rows here.")] = None,
) -> None:
    """Show rows as the model sees them: what is trained, what is only read, what was cut."""
    if html is not None:
        check_output(html, "--html")
    parsed = parse_recipe(recipe, task, context.args)
    from .preview import html_page, preview_rows, print_rows

    shown, report = preview_rows(parsed, rows)
    if html is None:
        print_rows(shown, report, Console())
        return
    write(html, html_page(shown, report, str(recipe)))
    typer.echo(f"The page is in {html}.")


@app.command(context_settings=OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipePath,
    task: Task = None,
    device: Annotated[str | None, typer.Option(help="cpu, h100-80gb, NAME-<N>gb, ... Default: this machine's.")] = None,
    accelerate_config: Annotated[str | None, typer.Option(help="File, or name in configs/accelerate.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Processes. Default: the config's, or 1.")] = None,
    full: Annotated[bool, typer.Option(help="Tokenize every row, not a sample.")] = False,
    reward_model: Annotated[str | None, typer.Option(help="Folder of a model to compare chosen with rejected.")] = None,
) -> None:
    """Say what a run would do, whether it fits, and what is wrong with it, without weights and without a GPU."""
    parsed = parse_recipe(recipe, task, context.args)
    from .check import check, read_sharding

    sharding = read_sharding(accelerate_config, num_processes)
    raise typer.Exit(check(parsed, device, sharding, full, reward_model))


@app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="File of settings (.yaml, .json), command, or script with one.")],
    out: Annotated[Path | None, typer.Option(help="Recipe to write. It must not exist. Default: shown here.")] = None,
    task: Task = None,
) -> None:
    """Turn the settings of LLaMA-Factory, axolotl, ms-swift, open-instruct, TRL, OpenRLHF, Open-R1 into a recipe."""
    with redirect_stdout(sys.stderr):
        from .migrate import migrate

    if out is not None:
        check_new(out, "--out")
    done = migrate(source, task)
    if out is None:
        typer.echo(done, nl=False)
    else:
        write(out, str(done))
        typer.echo(f"The recipe is in {out}.")
    for line in done.remarks():
        typer.echo(line, err=True)


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, trained or not.")],
    benchmarks: Annotated[list[str], typer.Option(help="Name in configs/benchmarks, or path. Repeat for several.")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")] = Path("benchmarks"),
    compare_to: Annotated[str | None, typer.Option(help="Model to show the difference to.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    devices: Annotated[list[str] | None, typer.Option(help="CUDA_VISIBLE_DEVICES of each job at a time.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each benchmark.")] = 7200,
) -> None:
    """Run benchmarks on any model and show the scores."""
    from ..following.benchmarks import BenchmarkJobs, find_benchmark
    from ..following.scores import scores_table

    check_output(out, "--out", folder=True)
    with user_errors():
        paths = [find_benchmark(name) for name in benchmarks]
    jobs = partial(BenchmarkJobs, benchmarks=paths, devices=devices or [], timeout=timeout)
    rows = jobs(out / "model").run(model, revision)
    others = jobs(out / "compare_to").run(compare_to) if compare_to else []
    Console().print(scores_table(rows, others, title=model, other_title=compare_to or ""))
    typer.echo(f"Results and logs are in {out}.")
    if any(row.status != "completed" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
