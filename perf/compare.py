"""Compare speed, memory and start-up of tunebook's scripts with TRL's own, side by side, on the CPU in float32.

python perf/compare.py                   measure all cases; write perf/results/<machine>.json, .png, docs/performance.md
python perf/compare.py --only rm-gsm8k   measure one case; print its table
python perf/compare.py --docs            write the tables of docs/performance.md again, from perf/results

Each case trains the same model on the same rows with the same batch. Each run is a process of its own, and the sides
alternate: TRL, tunebook, TRL, tunebook. TRL runs at its defaults, which recompute activations in the backward pass, and
once without recomputation. tunebook recomputes nothing where that takes no more memory than TRL. Elsewhere it
recomputes only what is cheap (selective).
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import rows
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset

from tunebook.tools.quickstart import materialize

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf/results"
DOCS = ROOT / "docs/performance.md"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
SCRIPTS = {
    "sft": ("trl.scripts.sft", "src/sft.py"),
    "rm": ("trl.scripts.reward", "src/rm.py"),
    "dpo": ("trl.scripts.dpo", "src/dpo.py"),
}
TRL, TUNEBOOK = "TRL", "tunebook"  # run in every round; the other two run in the first
TRL_NO_CHECKPOINTING, TUNEBOOK_NO_CHECKPOINTING = "TRL, no checkpointing", "tunebook, no checkpointing"


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    model: str
    rows: str  # name of a function in rows.py
    batch: int
    steps: int  # timed steps: one epoch
    sides: tuple[str, ...]
    selective: bool = False  # tunebook recomputes selectively, because it would take more memory than TRL otherwise


PAIR = (TRL, TUNEBOOK)
THREE = (*PAIR, TRL_NO_CHECKPOINTING)
FOUR = (*THREE, TUNEBOOK_NO_CHECKPOINTING)
CASES = (
    Case("sft-gsm8k", "sft", "SmolLM2-135M", "gsm8k", 8, 3, THREE),
    Case("rm-gsm8k", "rm", "SmolLM2-135M", "gsm8k_preferences", 8, 3, FOUR, selective=True),
    Case("dpo-gsm8k", "dpo", "SmolLM2-135M", "gsm8k_preferences", 8, 3, PAIR),
    Case("sft-long-tail", "sft", "10M", "long_tail", 8, 4, THREE),
    Case("rm-shared-prompts", "rm", "10M", "shared_prompts", 8, 2, FOUR, selective=True),
    Case("dpo-shared-prompts", "dpo", "10M", "shared_prompts", 8, 2, THREE),
    Case("sft-gsm8k-16", "sft", "SmolLM2-135M", "gsm8k", 16, 1, PAIR),
)
OTHERS = ("preparation", "scaling")
LENGTHS, BATCHES, BATCH_LENGTH = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8), 512  # for `scale`
SCALING_STEPS, PREPARED_ROWS = 3, 8000


# ---- Measuring -----------------------------------------------------------------------------------------------------


class Bench:
    """Run each measurement in its own process, in a temporary folder.

    Args:
        models: folder of each model, by the name that the cases use.
        gsm8k: folder with train.jsonl and preferences.jsonl. Without it, rows are random words of the same lengths.
        arguments: rounds, minutes and quick from the command line.
    """

    def __init__(self, folder: Path, models: dict[str, Path], gsm8k: Path | None, arguments: argparse.Namespace):
        self.folder, self.models, self.gsm8k = folder, models, gsm8k
        self.quick, self.rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.console, self.paths = Console(), 0

    def new_path(self) -> Path:
        self.paths += 1
        return self.folder / str(self.paths)

    def run(self, script: str, *arguments: object) -> Any:  # noqa: ANN401 - the JSON that the script wrote
        """Run another script of this folder and return its result. The data cache is empty; threads are inherited."""
        out = self.new_path()
        env = {**os.environ, "HF_DATASETS_CACHE": str(self.new_path()), "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-W", "ignore", str(ROOT / "perf" / script), str(out), *map(str, arguments)]
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{process.stderr[-4000:]}")
        return json.loads(out.read_text())

    def draw_rows(self, name: str, count: int) -> rows.Rows:
        return getattr(rows, name)(count, self.gsm8k)

    def write_recipe(self, options: dict[str, Any]) -> Path:
        recipe = self.new_path().with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(options))
        return recipe

    def compare(self, cases: list[Case]) -> dict[str, dict[str, Any]]:
        """Return the runs of both sides, round by round. Later rounds hold only the cases for which there is time."""
        records = {case.name: self.set_up(case) for case in cases}
        for round in range(self.rounds):
            for case in cases:
                record = records[case.name]
                if not round:
                    self.run_round(case, record, case.sides)
                elif time.monotonic() + sum(record["runs"][side][-1]["seconds"] for side in PAIR) < self.deadline:
                    self.run_round(case, record, PAIR)
        for record in records.values():
            del record["files"]
        return records

    def set_up(self, case: Case) -> dict[str, Any]:
        batch, steps = 2 if self.quick else case.batch, case.steps
        drawn = self.draw_rows(case.rows, batch * steps)
        ours = rows.write(drawn, self.new_path())
        # TRL reads its rows in order, so short rows come first, for a step that is not timed. tunebook balances batches
        # of pairs and packs rows of SFT, so a whole epoch that is not timed comes first there.
        theirs = rows.write(rows.short(batch, drawn[0]) + drawn, self.new_path()).parent
        common = {"per_device_train_batch_size": batch, "bf16": False, "use_cpu": True}
        common |= {"save_strategy": "no", "report_to": "none"}
        trl = {**common, "max_steps": 1 + steps, "train_sampling_strategy": "sequential"}
        tunebook = {**common, "max_steps": 2 * steps, "packing": True}
        if case.task == "sft":
            length = packed_length(drawn, self.models[case.model], steps)
            tunebook |= {"per_device_train_batch_size": 1, "max_length": length}
        else:
            tunebook["share_prefix"] = True
        plain = {**tunebook, "activation_checkpointing": False}
        selective = {**tunebook, "activation_checkpointing_kwargs": {"selective": True}}
        return {
            "case": asdict(case),
            "files": {TRL: theirs, TUNEBOOK: ours, TRL_NO_CHECKPOINTING: theirs, TUNEBOOK_NO_CHECKPOINTING: ours},
            "settings": {
                TRL: trl,
                TUNEBOOK: selective if case.selective else plain,
                TRL_NO_CHECKPOINTING: {**trl, "gradient_checkpointing": False},
                TUNEBOOK_NO_CHECKPOINTING: plain,
            },
            "matmul_rates": [],
            "runs": {side: [] for side in case.sides},
        }

    def run_round(self, case: Case, record: dict[str, Any], sides: tuple[str, ...]) -> None:
        model = self.models[case.model]
        record["matmul_rates"].append(matmul_rate(model))
        for side in sides:
            options = {
                "model_name_or_path": model,
                "dataset_name": record["files"][side],
                "output_dir": self.new_path(),
            }
            options = {name: str(path) for name, path in options.items()} | record["settings"][side]
            if side in (TUNEBOOK, TUNEBOOK_NO_CHECKPOINTING):
                arguments = (ROOT / SCRIPTS[case.task][1], "--config", self.write_recipe(options))
            else:
                arguments = (SCRIPTS[case.task][0], *(f"--{name}={value}" for name, value in options.items()))
            start = time.monotonic()
            run = self.run("measure.py", "train", *arguments)
            run["seconds"] = time.monotonic() - start
            run["steps"] = run["steps"][-case.steps :]
            record["runs"][side].append(run)
            self.console.log(f"{case.name}, {side}: {rate(run):,.0f} tokens/s")

    def prepare(self) -> dict[str, Any]:
        """Measure the seconds from a file to tokenized rows; the sides alternate."""
        count = 20 if self.quick else PREPARED_ROWS
        files = {}
        for task, name in (("sft", "gsm8k"), ("rm", "gsm8k_preferences"), ("dpo", "gsm8k_preferences")):
            files[task] = str(rows.write(self.draw_rows(name, count), self.new_path()))
        seconds = self.run("prepare.py", self.models["SmolLM2-135M"], json.dumps(files), self.rounds)
        self.console.log(f"preparation: {json.dumps(seconds)} s")
        return {task: {"rows": count, "seconds": of_task} for task, of_task in seconds.items()}

    def scale(self) -> list[dict[str, Any]]:
        """Measure SFT steps of the small model by the length of a row and by the number of rows."""
        lengths, batches, steps = (LENGTHS, BATCHES, SCALING_STEPS) if not self.quick else ((8, 16), (1, 2), 1)
        unit = BATCH_LENGTH if not self.quick else lengths[-1]
        shapes = [(length, 1) for length in lengths] + [(unit, batch) for batch in batches]
        recipes = []
        for length, batch in shapes:
            file = rows.write(rows.equal_lengths(batch * (steps + 1), length), self.new_path())
            options = {"model_name_or_path": str(self.models["10M"]), "dataset_name": str(file)}
            options |= {"output_dir": str(self.new_path()), "max_length": length, "per_device_train_batch_size": batch}
            options |= {"max_steps": steps + 1, "packing": True, "activation_checkpointing": False, "bf16": False}
            recipes.append(self.write_recipe({**options, "use_cpu": True, "save_strategy": "no"}))
        runs = self.run("measure.py", "scale", ROOT / SCRIPTS["sft"][1], *recipes)
        self.console.log("scaling: measured")
        return [
            {"length": length, "batch": batch, "seconds": [step["seconds"] for step in run["steps"][1:]]}
            for (length, batch), run in zip(shapes, runs, strict=True)
        ]


def packed_length(drawn: rows.Rows, model: Path, steps: int) -> int:
    """Return the length of a packed row at which `steps` packed rows hold all rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer([row["prompt"] + row["completion"] + tokenizer.eos_token for row in drawn])["input_ids"]
    lengths = list(map(len, tokens))
    length = max(*lengths, math.ceil(sum(lengths) / steps))
    while len(pack_dataset(Dataset.from_dict({"input_ids": tokens}), length, "bfd")) > steps:
        length = math.ceil(1.01 * length)
    return length


def matmul_rate(model: Path, tokens: int = 2048) -> float:
    """Return the operations per second of the first matrix product of the model's MLP on `tokens`, in float32."""
    config = AutoConfig.from_pretrained(model)
    x, weight = torch.randn(tokens, config.hidden_size), torch.randn(config.intermediate_size, config.hidden_size)
    timer = Timer(
        "linear(x, weight)",
        globals={"linear": F.linear, "x": x, "weight": weight},
        num_threads=torch.get_num_threads(),
    )
    return 2 * tokens * weight.numel() / timer.blocked_autorange(min_run_time=0.5).median


# ---- Summaries -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Size of a model, as far as its operations depend on it."""

    body: int  # parameters that every token is multiplied with
    head: int  # parameters of the LM head
    attention: int  # width of all attention layers together

    @classmethod
    def of(cls, model: Path) -> "Size":
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).base_model.num_parameters(exclude_embeddings=True)
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return cls(
            body=parameters,
            head=config.vocab_size * config.hidden_size,
            attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
        )


def operations(task: str, size: Size, lengths: np.ndarray, shared: np.ndarray, scored: int) -> float:
    """Return the floating-point operations that a training step needs, without padding and recomputation.

    The forward takes 2 operations per parameter and token, and 4 per query, visible key and unit of width. The backward
    takes twice as many. DPO adds the forward of the reference.

    Args:
        lengths: (documents,) tokens of each document.
        shared: (documents,) tokens of each document that another document already computes.
        scored: positions that the LM head scores.
    """
    forward = 2 * size.body * (lengths - shared).sum() + 2 * size.head * scored
    forward += 4 * size.attention * (lengths**2 - shared**2).sum() / 2
    return float(forward * (4 if task == "dpo" else 3))


def total(steps: list[dict[str, Any]], name: str) -> float:
    return float(sum(np.sum(step[name]) for step in steps))


def rate(run: dict[str, Any]) -> float:
    """Return the tokens per second of the rows, without padding. The prompt counts in both sides of a pair."""
    return total(run["steps"], "lengths") / total(run["steps"], "seconds")


def operation_rate(run: dict[str, Any], task: str, size: Size, shares: bool) -> float:
    """Return the needed operations per second of a run. `shares`: whether it computes shared prompts once."""
    needed = 0.0
    for step in run["steps"]:
        lengths, shared = np.array(step["lengths"]), np.array(step["shared"]) * shares
        needed += operations(task, size, lengths, shared, step["scored"])
    return needed / total(run["steps"], "seconds")


def summarize(record: dict[str, Any], size: Size) -> dict[str, Any]:
    """Return the numbers of a case: medians over the runs of each side.

    The speed-up is a median over rounds, because the speed of the machine changes from round to round.
    """
    task, runs = record["case"]["task"], record["runs"]
    matmul = median(record["matmul_rates"])
    tokens_per_second = {side: median(map(rate, of_side)) for side, of_side in runs.items()}
    peak_memory = {side: median(run["peak_memory"] for run in of_side) for side, of_side in runs.items()}
    padded, packed = ([step for run in runs[side] for step in run["steps"]] for side in PAIR)
    summary = {
        "tokens_per_second": tokens_per_second,
        "speedup": median(rate(ours) / rate(trl) for ours, trl in zip(runs[TUNEBOOK], runs[TRL], strict=True)),
        "peak_memory": peak_memory,
        "memory_ratio": peak_memory[TUNEBOOK] / peak_memory[TRL],
        "seconds_to_first_step": {
            side: median(run["seconds_to_first_step"] for run in of_side) for side, of_side in runs.items()
        },
        "padding_efficiency": total(padded, "lengths") / total(padded, "padded"),
        "shared_tokens": total(packed, "shared") / total(packed, "lengths"),
        "matmul_share": {
            TRL: median(operation_rate(run, task, size, shares=False) for run in runs[TRL]) / matmul,
            TUNEBOOK: median(operation_rate(run, task, size, shares=True) for run in runs[TUNEBOOK]) / matmul,
        },
    }
    if TRL_NO_CHECKPOINTING in runs:
        plain = TUNEBOOK_NO_CHECKPOINTING if record["case"]["selective"] else TUNEBOOK
        summary["speedup_without_checkpointing"] = rate(runs[plain][0]) / rate(runs[TRL_NO_CHECKPOINTING][0])
        summary["memory_ratio_without_checkpointing"] = peak_memory[plain] / peak_memory[TRL_NO_CHECKPOINTING]
    return summary


def summarize_cases(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sizes = {name: Size(**size) for name, size in results["models"].items()}
    return {name: summarize(record, sizes[record["case"]["model"]]) for name, record in results["cases"].items()}


def preparation_rates(prepared: dict[str, Any]) -> dict[str, float]:
    """Return the rows per second of each side and of the tokenizer alone, and the ratio of the two sides."""
    rates = {side: prepared["rows"] / median(seconds) for side, seconds in prepared["seconds"].items()}
    return {**rates, "speedup": rates["tunebook"] / rates["trl"]}


# ---- Tables and picture --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.header, ("---",) + ("---:",) * (len(self.header) - 1), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def table(self) -> Table:
        table = Table(*self.header, title=self.title)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*row)
        return table


def sheets(results: dict[str, Any]) -> list[Sheet]:
    """Return all tables of what was measured."""
    cases = summarize_cases(results)
    tables = []
    if cases:
        tables += [speed_sheet(results, cases), memory_sheet(cases), efficiency_sheet(cases)]
    if results["preparation"]:
        tables.append(preparation_sheet(results["preparation"]))
    if results["scaling"]:
        tables.append(scaling_sheet(results["scaling"]))
    return tables


def speed_sheet(results: dict[str, Any], cases: dict[str, Any]) -> Sheet:
    lines = []
    for name, summary in cases.items():
        case, tokens = results["cases"][name]["case"], summary["tokens_per_second"]
        lines.append(
            (
                name,
                case["model"],
                str(case["batch"]),
                "selective" if case["selective"] else "none",
                str(len(results["cases"][name]["runs"][TUNEBOOK])),
                *(cell(tokens, side, "{:,.0f}") for side in FOUR),
                f"{summary['speedup']:.2f}",
                cell(summary, "speedup_without_checkpointing", "{:.2f}"),
            )
        )
    header = ("case", "model", "batch", "tunebook's checkpointing", "runs", *FOUR)
    header += ("tunebook / TRL", "tunebook / TRL, no checkpointing")
    return Sheet("Training speed (tokens/s)", header, lines)


def cell(values: dict[str, float], name: str, form: str) -> str:
    return form.format(values[name]) if name in values else ""


def memory_sheet(cases: dict[str, Any]) -> Sheet:
    lines = []
    for name, summary in cases.items():
        gib = {side: size / 2**30 for side, size in summary["peak_memory"].items()}
        start = summary["seconds_to_first_step"]
        lines.append(
            (
                name,
                *(cell(gib, side, "{:.2f}") for side in FOUR),
                f"{summary['memory_ratio']:.2f}",
                cell(summary, "memory_ratio_without_checkpointing", "{:.2f}"),
                f"{start[TRL]:.1f}",
                f"{start[TUNEBOOK]:.1f}",
            )
        )
    header = ("case", *FOUR, "tunebook / TRL", "tunebook / TRL, no checkpointing", "start, TRL", "start, tunebook")
    return Sheet("Peak memory (GiB) and start (seconds from launch to the first step)", header, lines)


def efficiency_sheet(cases: dict[str, Any]) -> Sheet:
    lines = [
        (
            name,
            f"{summary['padding_efficiency']:.0%}",
            f"{summary['shared_tokens']:.0%}",
            *(f"{summary['matmul_share'][side]:.0%}" for side in PAIR),
        )
        for name, summary in cases.items()
    ]
    header = ("case", "tokens in TRL's batches that are not padding", "tokens saved by sharing")
    header += tuple(f"share of the matmul rate, {side}" for side in PAIR)
    return Sheet("Where the time goes", header, lines)


def preparation_sheet(prepared: dict[str, Any]) -> Sheet:
    lines = []
    for task, measured in prepared.items():
        rates = preparation_rates(measured)
        lines.append((task, *(f"{rates[side]:,.0f}" for side in measured["seconds"]), f"{rates['speedup']:.1f}"))
    header = ("task", TRL, TUNEBOOK, "tokenizer alone, on all cores", "tunebook / TRL")
    return Sheet("Data preparation, from a file to tokens (rows/s)", header, lines)


def scaling_sheet(scaling: list[dict[str, Any]]) -> Sheet:
    lines = []
    for shape in scaling:
        seconds, tokens = median(shape["seconds"]), shape["length"] * shape["batch"]
        lines.append((str(shape["length"]), str(shape["batch"]), f"{seconds:.2f}", f"{tokens / seconds:,.0f}"))
    return Sheet("SFT step by size (10M)", ("tokens per row", "rows", "seconds", "tokens/s"), lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw two plots: tokens per second relative to TRL (left), and seconds per step by tokens per step (right)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    cases = summarize_cases(results)
    places = np.arange(len(cases))
    for i, side in enumerate((TRL, TRL_NO_CHECKPOINTING, TUNEBOOK)):
        ratios = [summary["speedup"] for summary in cases.values()]
        if side != TUNEBOOK:
            rates = [summary["tokens_per_second"] for summary in cases.values()]
            ratios = [of_case.get(side, np.nan) / of_case[TRL] for of_case in rates]
        bars = left.barh(places + 0.27 * (i - 1), ratios, height=0.25, label=side)
        left.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    left.set_yticks(places, cases)
    left.invert_yaxis()
    left.set_xlabel("tokens/s relative to TRL")
    left.legend(fontsize=8)
    for label, chosen in (
        ("one row with all tokens", lambda shape: shape["batch"] == 1),
        (f"rows of {BATCH_LENGTH} tokens", lambda shape: shape["length"] == BATCH_LENGTH),
    ):
        shapes = [shape for shape in results["scaling"] if chosen(shape)]
        seconds = {shape["length"] * shape["batch"]: median(shape["seconds"]) for shape in shapes}
        right.loglog(seconds.keys(), seconds.values(), marker="o", label=label)
    ticks = sorted({shape["length"] * shape["batch"] for shape in results["scaling"]})
    right.set_xticks(ticks, ticks)
    right.xaxis.minorticks_off()
    seconds = [0.1, 0.2, 0.5, 1, 2, 5]
    right.set_yticks(seconds, seconds)
    right.yaxis.minorticks_off()
    right.set_xlabel("tokens per step")
    right.set_ylabel("seconds per step (SFT, 10M parameters)")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=130)


def write_tables(text: str, kind: str, sheets: Callable[[dict[str, Any]], list[Sheet]]) -> str:
    """Return the page with the `sheets` of perf/results/NAME.json after each <!-- KIND: NAME -->."""

    def tables(match: re.Match) -> str:
        results = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return match[1] + "\n" + "\n".join(sheet.markdown() for sheet in sheets(results)) + "\n" + match[3]

    return re.sub(rf"(<!-- {kind}: (\S+) -->\n).*?(<!-- end of {kind} -->)", tables, text, flags=re.DOTALL)


# ---- Machine and command line --------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", cpu).lower()).strip("-")
    return {
        "name": f"{name}-{cores}-cores",
        "cpu": cpu,
        "cores": cores,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def measure(arguments: argparse.Namespace, command: str, folder: Path) -> dict[str, Any]:
    models = {"SmolLM2-135M": arguments.model, "10M": folder / "10M"}
    if arguments.quick:
        models["SmolLM2-135M"] = models["10M"]
        rows.save_small_model(models["10M"], hidden_size=40, intermediate_size=64, num_hidden_layers=2)
    else:
        rows.save_small_model(models["10M"])
        materialize(arguments.model)
    bench = Bench(folder, models, arguments.gsm8k, arguments)
    chosen = [arguments.only] if arguments.only else [*OTHERS, *(case.name for case in CASES)]
    prepared = bench.prepare() if "preparation" in chosen else {}
    scaling = bench.scale() if "scaling" in chosen else []
    cases = bench.compare([case for case in CASES if case.name in chosen])
    return {
        "machine": describe_machine(),
        "command": command,
        "rows": "GSM8K" if arguments.gsm8k else "random words, in the lengths of GSM8K",
        "versions": {name: version(name) for name in PACKAGES},
        "models": {name: asdict(Size.of(model)) for name, model in models.items()},
        "cases": cases,
        "preparation": prepared,
        "scaling": scaling,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and preferences.jsonl (default: words)")
    parser.add_argument("--only", choices=[*(case.name for case in CASES), *OTHERS])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, if the time allows")
    parser.add_argument("--minutes", type=float, default=30, help="start no further round that would end after this")
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to check that the script works")
    parser.add_argument("--output", type=Path, help="folder for results (default: perf/results, if all is measured)")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the tables of docs/performance.md")
    arguments = parser.parse_args(argv)
    everything = not (arguments.quick or arguments.only or arguments.docs)
    if not arguments.docs:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(arguments, shlex.join(["python", "perf/compare.py", *argv]), Path(folder))
        console = Console(width=None if sys.stdout.isatty() else 140)
        for sheet in sheets(results):
            console.print(sheet.table())
        if output := arguments.output or (RESULTS if everything else None):
            output.mkdir(parents=True, exist_ok=True)
            file = output / f"{results['machine']['name']}.json"
            file.write_text(json.dumps(results, indent=1) + "\n")
            draw(results, file.with_suffix(".png"))
    if everything or arguments.docs:
        DOCS.write_text(write_tables(DOCS.read_text(), "results", sheets))


if __name__ == "__main__":
    main(sys.argv[1:])
