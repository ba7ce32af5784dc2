"""A run on one page, `report.html`: curves, rewards, benchmarks, generations before and after, recipe, data, versions.

It is made from what is in the run's folder alone, so also after the run, for one that was killed, and for several at a
time: `tunebook report RUN [RUN ...]`. One file that needs no network and no JavaScript; its pictures are PNGs beside it
too.
"""

import base64
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..checkpoints import list_checkpoints
from ..errors import RecipeError
from ..files import read_rows, write_yaml
from .generations import TABLE
from .scores import REWARDS_FILE, ROWS_FILE, flat_scores
from .trackers import COUNTERS

logger = logging.getLogger(__name__)

RECORD_FILE = "record.json"  # what a run is made of, written before it trains
STATE_FILE = "trainer_state.json"
TEMPLATE = Path(__file__).with_name("report.html")
REPORT = "report.html"

CURVES = {  # keys of the log, without eval_: title, and what the axis counts
    "loss": ("Loss", "loss"),
    "mean_token_accuracy": ("Next-token accuracy", "share of tokens"),
    "accuracy": ("Pair accuracy", "share of pairs"),
    "margin": ("Reward margin", "reward, chosen - rejected"),
    "rewards/accuracies": ("Pair accuracy", "share of pairs"),
    "rewards/margins": ("Implicit reward margin", "reward, chosen - rejected"),
    "learning_rate": ("Learning rate", "learning rate"),
    "muon_learning_rate": ("Learning rate of Muon", "learning rate"),
    "grad_norm": ("Gradient norm", "L2 norm before clipping"),
    "tokens_per_second": ("Speed", "tokens/s, all devices"),
    "mfu": ("Model FLOPs utilization", "share of the bf16 peak"),
}

# Okabe and Ito's colours that can be told apart by everyone, on white and on black
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a run's name may hold a $
}


def theme(text: str, lines: str, background: str) -> dict[str, Any]:
    texts = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    strokes = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    faces = ("figure.facecolor", "axes.facecolor")
    return STYLE | dict.fromkeys(texts, text) | dict.fromkeys(strokes, lines) | dict.fromkeys(faces, background)


LIGHT, DARK = theme("#1f2328", "#d1d5da", "#ffffff"), theme("#e6e8eb", "#474d56", "#16191d")


# ---- What is on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """What a run left: its record, the trainer's state, and the rows that it wrote, empty where there are none."""

    name: str
    record: dict[str, Any]
    state: dict[str, Any]
    benchmarks: list[dict[str, Any]]
    generations: list[dict[str, Any]]
    rewards: pd.DataFrame

    def series(self, key: str) -> dict[int, float]:
        """Step -> value of a key of the log; of a step that was logged twice, the later value."""
        return {entry["step"]: entry[key] for entry in self.state["log_history"] if key in entry}

    def scores(self) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
        """(task, metric) -> step -> score and its standard error (0 where it is not known)."""
        curves: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
        for row in self.benchmarks:
            if row["step"] is not None:  # the others are of other models
                errors = flat_scores([row], "stderr")
                for name, score in flat_scores([row]).items():
                    curves.setdefault(name, {})[row["step"]] = score, errors.get(name, 0.0)
        return curves


def read_run(folder: Path, name: str) -> RunFolder:
    """A run that ended, goes on, or was killed: then as far as its last complete checkpoint.

    Raises:
        RecipeError: the folder is not one of a run.
    """
    record = read_json(folder / RECORD_FILE)
    if record is None:
        raise RecipeError(f"{folder} is not the folder of a run (its output_dir): there is no {RECORD_FILE}.")
    states = [read_json(path / STATE_FILE) for path in (*list_checkpoints(folder)[-1:], folder)]
    nothing = {"global_step": 0, "max_steps": 0, "epoch": 0.0, "log_history": []}
    return RunFolder(
        name,
        record,
        max(filter(None, [nothing, *states][::-1]), key=lambda state: state["global_step"]),
        read_rows(folder / ROWS_FILE),
        read_rows(folder / f"{TABLE}.jsonl"),
        read_rewards(folder / REWARDS_FILE),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no file, or only the beginning of one, of a run that was killed."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))


def read_rewards(path: Path) -> pd.DataFrame:
    """Finite rewards of both sides, by pair; none where none were written."""
    written = path.exists() and path.stat().st_size
    rewards = pd.read_csv(path) if written else pd.DataFrame(columns=["chosen", "rejected"], dtype=float)
    rewards = rewards.apply(pd.to_numeric, errors="coerce")  # a row that was cut
    return rewards[np.isfinite(rewards).all(axis=1)]


# ---- Pictures ------------------------------------------------------------------------------------------------------


def draw_figures(runs: Sequence[RunFolder]) -> dict[str, Figure]:
    """File name -> figure, for all that any of the runs logged, the runs on the same axes.

    A colour is a run; of a single run, training or evaluation. Evaluations are dots on a dashed line.
    """
    figures, several = {}, len(runs) > 1
    for key, (title, ylabel) in CURVES.items():
        trained, evaluated = ([run.series(prefix + key) for run in runs] for prefix in ("", "eval_"))
        if any(trained + evaluated):
            dashed = several and any(trained) and any(evaluated)
            figure = new_figure(f"{title} (dashed: evaluation)" if dashed else title, "step", ylabel)
            for i, run in enumerate(runs):
                plot(figure, run.name if several else "training", trained[i], i)
                label = ("" if trained[i] else run.name) if several else "evaluation"
                plot(figure, label, evaluated[i], i if several else 1, dashed=True)
            figures[key] = figure
    scores = [run.scores() for run in runs]
    for task, metric in sorted({name for of_run in scores for name in of_run}):
        figure = new_figure(f"{task}, {metric}", "step", "score ± standard error")
        for i, run in enumerate(runs):
            points = scores[i].get((task, metric), {})
            values, errors = ({step: point[j] for step, point in points.items()} for j in (0, 1))
            plot(figure, run.name, values, i, errors=list(errors.values()))
        figures[f"benchmark_{task}_{metric}"] = figure
    for run in runs:
        if len(run.rewards):
            title, file = "Rewards of the last evaluation", "rewards"
            if several:
                title, file = f"{title}, {run.name}", f"{file}_{run.name}"
            figures[file] = figure = new_figure(title, "reward", "pairs")
            sides = [run.rewards[side] for side in ("chosen", "rejected")]
            figure.axes[0].hist(sides, bins=30, color=COLORS[:2], label=("chosen", "rejected"))
    last = max((entry["step"] for run in runs for entry in run.state["log_history"]), default=1)
    for figure in figures.values():
        [axes] = figure.axes
        if axes.get_xlabel() == "step":
            axes.set_xlim(-0.03 * last, 1.03 * last)
        if several or len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
    return {file.replace("/", "_"): figure for file, figure in figures.items()}


def new_figure(title: str, xlabel: str, ylabel: str) -> Figure:
    figure = Figure(figsize=(5.6, 3.1))
    figure.subplots_adjust(left=0.17, right=0.98, bottom=0.15, top=0.91)  # the same for all, which aligns them
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter(format_tick)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def format_tick(value: float, position: int | None = None) -> str:
    if not 0 < abs(value) < 1e-3:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def plot(
    figure: Figure,
    label: str,
    points: Mapping[int, float],
    color: int,
    *,
    dashed: bool = False,
    errors: Sequence[float] | None = None,
) -> None:
    if points:
        figure.axes[0].errorbar(
            list(points),
            list(points.values()),
            errors,
            label=label or "_nolegend_",
            color=COLORS[color % len(COLORS)],
            linestyle="--" if dashed else "-",
            marker="o" if dashed or errors or len(points) == 1 else "",
            markersize=4,
            capsize=2,
        )


def draw_png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


# ---- The page ------------------------------------------------------------------------------------------------------


def list_facts(run: RunFolder) -> dict[str, str]:
    record, state = run.record, run.state
    speeds = list(run.series("tokens_per_second").values())
    seconds = list(run.series("train_runtime").values())
    return {
        "Task": record["task"],
        "Model": record["model"],
        "Steps": f"{state['global_step']} of {state['max_steps']}" if state["max_steps"] else "none saved",
        "Epochs": f"{state['epoch'] or 0:.4g}",
        "Time since the last start": str(timedelta(seconds=round(seconds[-1]))) if seconds else "not finished",
        "Speed, median": f"{median(speeds):,.0f} tokens/s" if speeds else "",
        "Resumed from": ", ".join(record["resumed_from"]) or "never",
    }


def list_origins(run: RunFolder) -> dict[str, str]:
    record = run.record
    return {
        **{f"Rows, {split}": text for split, text in record["rows"].items()},
        "Fingerprint of the tokens": record["data"],
        "Seed": record["seed"],
        **record["versions"],
    }


def list_results(run: RunFolder) -> dict[str, str]:
    """First and last value of the loss, of all that was evaluated, and of the benchmarks."""
    keys = {key: None for entry in run.state["log_history"] for key in entry if key.startswith("eval_")}
    names = [key for key in keys if key.removeprefix("eval_") not in COUNTERS and not key.startswith("eval_bench_")]
    curves = {key: list(run.series(key).values()) for key in ("loss", *names)}
    for (task, metric), points in run.scores().items():
        curves[f"benchmark {task} {metric}"] = [points[step][0] for step in sorted(points)]
    return {name: " → ".join(f"{value:.4g}" for value in (v[0], v[-1])[-len(v) :]) for name, v in curves.items() if v}


def list_gaps(run: RunFolder) -> Iterator[str]:
    """What a curve cannot show."""
    if not run.state["log_history"]:
        yield f"{run.name}: nothing was logged, or no checkpoint was saved before the run was killed."
    for key in CURVES:
        for name in (key, f"eval_{key}"):
            values = run.series(name).values()
            if missing := sum(not math.isfinite(value) for value in values):
                yield f"{run.name}: {missing} of {len(values)} values of {name} are not finite."


def pair_generations(run: RunFolder) -> list[tuple[str, ...]]:
    """Prompt, setting of the sweep, and what the model said at the first and at the last evaluation."""
    swept = run.record["recipe"].get("eval_generation_kwargs") or {}
    by_step: dict[int, dict[tuple[str, ...], str]] = {}
    for row in run.generations:
        setting = ", ".join(f"{key} {row[key]}" for key in swept if key in row)
        by_step.setdefault(row["step"], {})[row["prompt"], setting] = row["output"]
    if not by_step:
        return []
    first, last = min(by_step), max(by_step)
    header = ("Prompt", f"Before (step {first})", f"After (step {last})")
    rows = [
        ("\n".join(filter(None, key)), by_step[first].get(key, ""), output) for key, output in by_step[last].items()
    ]
    return [header, *rows]


def compare(names: Sequence[str], columns: Iterable[Mapping[str, Any]], missing: str = "") -> list[tuple[Any, ...]]:
    """A table, its header first, with a row for each key of any column."""
    columns = list(columns)
    keys = {key: None for column in columns for key in column}
    return [("", *names), *((key, *(column.get(key, missing) for column in columns)) for key in keys)]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page on one or several runs to `out`, and its pictures to the folder beside it, of its name.

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
    themes = []
    for colors in (LIGHT, DARK):
        with matplotlib.rc_context(colors):
            figures = draw_figures(runs)
            themes.append({file: draw_png(figure) for file, figure in figures.items()})
    for file, png in themes[0].items():
        (pictures / f"{file}.png").write_bytes(png)
    recipes = compare(names, [run.record["recipe"] for run in runs], missing="default")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = page.render(
        names=names,
        gaps=[gap for run in runs for gap in list_gaps(run)],
        facts=compare(names, map(list_facts, runs)),
        figures=[
            (figure.axes[0].get_title(loc="left"), *(base64.b64encode(theme[file]).decode() for theme in themes))
            for file, figure in figures.items()
        ],
        results=compare(names, map(list_results, runs)),
        generations=dict(zip(names, map(pair_generations, runs), strict=True)),
        differences=[row for row in recipes if any(cell != row[1] for cell in row[2:])],
        recipes={run.name: write_yaml(run.record["recipe"]) for run in runs},
        origins=compare(names, map(list_origins, runs)),
    )
    out.write_text(html, encoding="utf-8")


def report_run(output_dir: Path) -> None:
    """The page of a run that ends. One that cannot be written, on a full disk, is told and fails nothing."""
    try:
        write_report([output_dir], output_dir / REPORT)
    except OSError as error:
        logger.warning("There is no report of %s: %s", output_dir, error)
