"""A run on one page, `report.html`: curves, rewards, benchmarks, generations before and after, recipe, data, versions.

It is made from the run's folder alone, so also for a run that was killed, and for several on the same axes: `tunebook
report RUN [RUN ...]`. The page is one file that needs no network and no JavaScript; its pictures are PNG files, too.
"""

import base64
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict, cast

import matplotlib.style
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..checkpoints import Record, list_checkpoints
from ..errors import RecipeError
from ..files import ROW, read_rows, read_yaml, write_yaml
from .generations import GENERATION, TABLE
from .pairs import show_accuracy
from .scores import REWARDS_FILE, ROWS_FILE, BenchmarkRow, flatten, read_scored_rows
from .trackers import COUNTERS

logger = logging.getLogger(__name__)

RECORD_FILE = "record.json"  # what a run is made of, written before it trains
STATE_FILE = "trainer_state.json"
FOLDER = Path(__file__).parent
REPORT = "report.html"
THEMES = [[FOLDER / "report.mplstyle", FOLDER / f"{name}.mplstyle"] for name in ("light", "dark")]

# Key of the log without eval_ -> title and label of the axis
CURVES = read_yaml((FOLDER / "curves.yaml").read_text(encoding="utf-8"), "curves.yaml")


class State(TypedDict):
    """What is read of transformers' trainer_state.json."""

    global_step: int
    max_steps: int
    epoch: float | None
    log_history: list[dict[str, float]]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, read: its record, the trainer's state, and the rows that it wrote, empty where there are none."""

    name: str
    record: Record
    state: State
    benchmarks: list[BenchmarkRow]
    generations: list[dict[str, Any]]
    rewards: pd.DataFrame

    def series(self, key: str) -> pd.Series:
        """Return a key of the log by step; of a step that was logged twice, the later value."""
        log = self.state["log_history"]
        return pd.Series({entry["step"]: entry[key] for entry in log if key in entry}, dtype=float)

    def scores(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Return (task, metric) -> a frame by step of the columns score and stderr (0 where it is not known)."""
        curves: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
        for row in self.benchmarks:
            if row.step is not None:  # the others are of models that this run did not train
                errors = flatten([row.stderr])
                for name, score in flatten([row.scores]).items():
                    curves.setdefault(name, {})[row.step] = score, errors.get(name, 0.0)
        frames = {name: pd.DataFrame(points, index=["score", "stderr"]).T for name, points in curves.items()}
        return {name: frame.sort_index() for name, frame in frames.items()}


def read_run(folder: Path, name: str) -> RunFolder:
    """Read a run that ended, is running, or was killed: then as far as its last complete checkpoint.

    Raises:
        RecipeError: the folder is not one of a run.
    """
    record = read_json(folder / RECORD_FILE)
    if record is None:
        raise RecipeError(f"{folder} is not the folder of a run (its output_dir): there is no {RECORD_FILE}.")
    nothing: State = {"global_step": 0, "max_steps": 0, "epoch": 0.0, "log_history": []}
    states = [cast(State | None, read_json(path / STATE_FILE)) for path in (folder, *list_checkpoints(folder)[-1:])]
    state = max(filter(None, [*states, nothing]), key=lambda state: state["global_step"])
    benchmarks = read_scored_rows(folder / ROWS_FILE)
    generations = [row.model_dump() for row in read_rows(folder / f"{TABLE}.jsonl", GENERATION)]
    return RunFolder(name, cast(Record, record), state, benchmarks, generations, read_rewards(folder / REWARDS_FILE))


def read_json(path: Path) -> dict[str, object] | None:
    """Read a JSON file; None where there is none, or it is damaged."""
    with suppress(FileNotFoundError, ValueError):
        return ROW.validate_json(path.read_bytes())
    return None


def read_rewards(path: Path) -> pd.DataFrame:
    """Read the finite rewards of both sides, by pair; none where none were written."""
    written = path.exists() and path.stat().st_size
    rewards = pd.read_csv(path) if written else pd.DataFrame(columns=["chosen", "rejected"], dtype=float)
    rewards = rewards.apply(pd.to_numeric, errors="coerce")  # a row that was cut
    return rewards[np.isfinite(rewards).all(axis=1)]


def draw_figures(runs: Sequence[RunFolder]) -> dict[str, Figure]:
    """Return file name -> figure, for all that any of the runs logged, the runs on the same axes.

    Each run has a colour; in the figures of a single run, training and evaluation have one each. Evaluations are dots
    on a dashed line.
    """
    figures, several, scores = {}, len(runs) > 1, [run.scores() for run in runs]
    steps = [row.step for run in runs for row in run.benchmarks if row.step is not None]
    last = max([1, *steps, *(run.state["global_step"] for run in runs)])
    for key, (title, label) in CURVES.items():
        figures[key] = figure = new_figure(title, label, last)
        for i, run in enumerate(runs):
            trained, evaluated = run.series(key), run.series(f"eval_{key}")
            plot(figure, trained, i, run.name if several else "training")
            label = ("_nolegend_" if len(trained) else run.name) if several else "evaluation"
            plot(figure, evaluated, i if several else 1, label, linestyle="--", marker="o")
        if several and len({line.get_linestyle() for line in figure.axes[0].lines}) > 1:
            figure.axes[0].set_title(f"{title} (dashed: evaluation)")
    for task, metric in sorted(set().union(*scores)):
        figures[f"benchmark_{task}_{metric}"] = figure = new_figure(f"{task}, {metric}", "score ± standard error", last)
        for i, run in enumerate(runs):
            if (task, metric) in scores[i]:
                points = scores[i][task, metric]
                plot(figure, points["score"], i, run.name, yerr=points["stderr"], marker="o")
    for run in runs:
        if len(run.rewards):
            suffix, title = (f"_{run.name}", f", {run.name}") if several else ("", "")
            figures[f"rewards{suffix}"] = figure = new_figure(f"Rewards of the last evaluation{title}", "pairs")
            figure.axes[0].hist(run.rewards, bins=30, label=[str(column) for column in run.rewards])
    figures = {file.replace("/", "_"): figure for file, figure in figures.items() if figure.axes[0].has_data()}
    for figure in figures.values():
        if several or len(figure.axes[0].get_legend_handles_labels()[0]) > 1:
            figure.axes[0].legend()
    return figures


def new_figure(title: str, ylabel: str, last_step: int | None = None) -> Figure:
    """Return a figure over steps, or over rewards where `last_step` is None."""
    figure = Figure()
    axes = figure.subplots()
    axes.set(title=title, xlabel="step" if last_step else "reward", ylabel=ylabel)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    if last_step:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlim(-0.03 * last_step, 1.03 * last_step)
    return figure


def plot(figure: Figure, values: pd.Series, color: int, label: str, marker: str = "", **style: object) -> None:
    if len(values):
        marker = marker or ("o" if len(values) == 1 else "")
        figure.axes[0].errorbar(values.index, values, color=f"C{color}", label=label, marker=marker, **style)  # type: ignore[arg-type]


def list_facts(run: RunFolder) -> dict[str, str | None]:
    record, state = run.record, run.state
    speeds, seconds = run.series("tokens_per_second"), [*run.series("train_runtime")]
    return {
        "Task": record["task"],
        "Model": record["model"],
        "Steps": f"{state['global_step']} of {state['max_steps']}" if state["max_steps"] else "none saved",
        "Epochs": f"{state['epoch'] or 0:.4g}",
        "Time since the last start": str(timedelta(seconds=round(seconds[-1]))) if seconds else "not finished",
        "Speed, median": f"{speeds.median():,.0f} tokens/s" if len(speeds) else "",
        "Resumed from": ", ".join(record["resumed_from"]) or "never",
    }


def list_origins(run: RunFolder) -> dict[str, object]:
    record = run.record
    rows = {f"Rows, {split}": text for split, text in record["rows"].items()}
    return {**rows, "Fingerprint of the tokens": record["data"], "Seed": record["seed"], **record["versions"]}


def list_results(run: RunFolder) -> dict[str, str]:
    """Return the first and last value of the loss, of all that was evaluated, and of the benchmarks."""
    keys = {key: None for entry in run.state["log_history"] for key in entry if key.startswith("eval_")}
    names = [key for key in keys if key.removeprefix("eval_") not in COUNTERS and not key.startswith("eval_bench_")]
    curves = {key: run.series(key) for key in ("loss", *names)}
    curves |= {f"benchmark {task} {metric}": points["score"] for (task, metric), points in run.scores().items()}
    results = {name: [f"{v:.4g}" for v in [*c[:1], *c[1:][-1:]]] for name, c in curves.items() if len(c)}
    if pairs := [entry for entry in run.state["log_history"] if "eval_accuracy" in entry]:
        results["eval_accuracy"] = [show_accuracy(entry) for entry in [*pairs[:1], *pairs[1:][-1:]]]
    return {name: " → ".join(values) for name, values in results.items()}


def list_gaps(run: RunFolder) -> Iterator[str]:
    """Yield what a curve cannot show."""
    if not run.state["log_history"]:
        yield f"{run.name}: nothing was logged, or no checkpoint was saved before the run was killed."
    for name in (prefix + key for key in CURVES for prefix in ("", "eval_")):
        finite = np.isfinite(run.series(name))
        if not finite.all():
            yield f"{run.name}: {(~finite).sum()} of {len(finite)} values of {name} are not finite."


def list_unlike(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Yield what of several runs cannot be compared."""
    rows = {run.record["evaluation"] for run in runs if run.record.get("evaluation")}
    if len(rows) > 1:
        yield "The runs were evaluated on different rows: their evaluation losses and accuracies cannot be compared."


def pair_generations(run: RunFolder) -> list[tuple[str, ...]]:
    """Return a table of prompts, with the sweep's setting, and their outputs at the first and the last evaluation."""
    swept = run.record["recipe"].get("eval_generation_kwargs") or {}
    outputs: dict[int, dict[str, str]] = {}
    for row in run.generations:
        setting = ", ".join(f"{key} {row[key]}" for key in swept if key in row)
        prompt = "\n".join(filter(None, (row["prompt"], setting)))
        outputs.setdefault(row["step"], {})[prompt] = row["output"]
    if not outputs:
        return []
    first, last = min(outputs), max(outputs)
    header = ("Prompt", f"Before (step {first})", f"After (step {last})")
    return [header, *((prompt, outputs[first].get(prompt, ""), output) for prompt, output in outputs[last].items())]


def compare(
    names: Sequence[str], columns: Iterable[Mapping[str, object]], missing: str = ""
) -> list[tuple[object, ...]]:
    """Return a table, its header first, with a row for each key of any column."""
    columns = list(columns)
    keys = {key: None for column in columns for key in column}
    return [("", *names), *((key, *(column.get(key, missing) for column in columns)) for key in keys)]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page on one or several runs to `out`, and its pictures to the folder of the same name.

    Raises:
        RecipeError: a folder is not one of a run, or `out` does not end in .html.
    """
    if out.suffix != ".html":
        raise RecipeError(f"--out {out} does not end in .html.")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[bytes]] = {}
    for theme in THEMES:
        with matplotlib.style.context(theme):
            figures = draw_figures(runs)
            for file, figure in figures.items():
                figure.savefig(png := BytesIO(), format="png")
                drawn.setdefault(file, []).append(png.getvalue())
    for file, (light, _) in drawn.items():
        (pictures / f"{file}.png").write_bytes(light)
    recipes = compare(names, [run.record["recipe"] for run in runs], missing="default")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string((FOLDER / "report.html").read_text(encoding="utf-8"))
    html = page.render(
        names=names,
        gaps=[*list_unlike(runs), *(gap for run in runs for gap in list_gaps(run))],
        facts=compare(names, map(list_facts, runs)),
        figures=[
            (figures[file].axes[0].get_title(loc="left"), *(base64.b64encode(png).decode() for png in pngs))
            for file, pngs in drawn.items()
        ],
        results=compare(names, map(list_results, runs)),
        generations=dict(zip(names, map(pair_generations, runs), strict=True)),
        differences=[row for row in recipes if any(cell != row[1] for cell in row[2:])],
        recipes={run.name: write_yaml(run.record["recipe"]) for run in runs},
        origins=compare(names, map(list_origins, runs)),
    )
    out.write_text(html, encoding="utf-8")


def report_run(output_dir: Path) -> None:
    """Write the page of a run that ends. A page that cannot be written, on a full disk, is a warning."""
    try:
        write_report([output_dir], output_dir / REPORT)
    except OSError as error:
        logger.warning("There is no report of %s: %s", output_dir, error)
