"""Compare the peak memory of training steps on the CPU with the estimate of tunebook.tools.memory.

python perf/memory.py          measure every case; write perf/results/memory-<machine>.json, docs/preflight.md's table
python perf/memory.py --docs   write the table again, from perf/results

Each run is a process of its own. Its memory is the peak of the whole process (getrusage, ru_maxrss).
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rows
import yaml
from compare import PACKAGES, RESULTS, ROOT, SCRIPTS, Sheet, describe_machine, write_tables
from rich.console import Console
from transformers import AutoConfig, LlamaConfig

from tunebook.environment import Sharding
from tunebook.recipe import parse
from tunebook.tools.memory import estimate
from tunebook.tools.workload import Batch, Workload

DOCS = ROOT / "docs/preflight.md"
SIZES = {
    "10M": {},
    "55M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10},
}
ROWS = {"10M": 8, "55M": 4, "SmolLM2-135M": 2}  # per batch; for pairs half of it


def cases() -> Iterator[dict[str, Any]]:
    """Yield the model and the recipe keys of every run."""
    for model, task, lora, checkpointing in itertools.product(
        (*SIZES, "SmolLM2-135M"), SCRIPTS, (False, True), (False, True)
    ):
        batch = ROWS[model] if task == "sft" else ROWS[model] // 2
        keys = {"use_peft": lora, "activation_checkpointing": checkpointing, "per_device_train_batch_size": batch}
        yield {"model": model, "task": task, "keys": keys}
        if model != "55M" and not lora and not checkpointing:
            packing = {"packing": True} | (
                {"per_device_train_batch_size": 1, "max_length": 1024} if task == "sft" else {}
            )
            yield {"model": model, "task": task, "keys": keys | packing}


def run(case: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """Run two steps on the rows of one batch, so both have the same size. The second has optimizer states."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    keys, draw = case["keys"], rows.gsm8k if case["task"] == "sft" else rows.gsm8k_preferences
    file = rows.write(draw(5 if "max_length" in keys else keys["per_device_train_batch_size"]), folder / "data")
    recipe = {"model_name_or_path": str(model), "dataset_name": str(file), "output_dir": str(folder / "out")}
    recipe |= {"max_steps": 2, "bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    config, out = folder / "recipe.yaml", folder / "result.json"
    config.write_text(yaml.safe_dump(recipe | keys))
    command = ["measure.py", out, "train", ROOT / SCRIPTS[case["task"]][1], "--config", config]
    subprocess.run([sys.executable, *command], cwd=ROOT / "perf", check=True, capture_output=True)
    return json.loads(out.read_text())


def batch_of(step: dict[str, Any], task: str, packed: bool) -> Batch:
    """Return the shape of a measured batch from what perf/measure.py wrote."""
    count, tokens, shared = len(step["lengths"]), sum(step["lengths"]), sum(step["shared"])
    scored = count if task == "rm" else step["scored"]
    if not packed:
        return Batch(count, step["padded"] // count, scored)
    return Batch(1, tokens - shared * (task != "sft"), scored, None if task == "sft" else tokens, packed=True)


def estimated(case: dict[str, Any], config) -> float:
    """Return the estimated bytes of a case of the results."""
    keys = {"model_name_or_path": "model", "dataset_name": "rows", "output_dir": "out", "bf16": False, "use_cpu": True}
    recipe = parse(case["task"], keys | case["keys"])
    workload = Workload.from_recipe(recipe, config, Batch(**case["batch"]), Sharding(), "cpu", accumulates=False)
    return sum(part.bytes for part in estimate(workload))


def measure_case(case: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    result = run(case, model, folder)
    batch = batch_of(result["steps"][-1], case["task"], case["keys"].get("packing", False))
    Console().log(f"{case['model']} {describe(case)}: {result['peak_memory'] / 1e9:.2f} GB")
    return case | {"batch": asdict(batch), "measured": result["peak_memory"]}


def measure(model: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"SmolLM2-135M": model} | {size: folder / size for size in SIZES}
        for size, changes in SIZES.items():
            rows.save_small_model(models[size], **changes)
        return {
            "machine": describe_machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "models": {name: AutoConfig.from_pretrained(path).to_diff_dict() for name, path in models.items()},
            "cases": [measure_case(case, models[case["model"]], folder) for case in cases()],
        }


def describe(case: dict[str, Any]) -> str:
    keys = case["keys"]
    words = [case["task"], "LoRA" if keys["use_peft"] else "full"]
    words += ["packed"] * keys.get("packing", False) + ["checkpointing"] * keys["activation_checkpointing"]
    return ", ".join(words)


def sheet(results: dict[str, Any]) -> Sheet:
    lines = []
    for case in results["cases"]:
        estimate, measured = estimated(case, LlamaConfig(**results["models"][case["model"]])), case["measured"]
        gigabytes = (f"{figure / 1e9:.2f}" for figure in (estimate, measured))
        lines.append((case["model"], describe(case), *gigabytes, f"{estimate / measured - 1:+.0%}"))
    header = ("model", "run", "estimate (GB)", "measured (GB)", "error")
    return Sheet(f"{results['machine']['cpu']}, float32", header, lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the table of docs/preflight.md")
    arguments = parser.parse_args(argv)
    if not arguments.docs:
        results = measure(arguments.model)
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"memory-{results['machine']['name']}.json"
        file.write_text(json.dumps(results, indent=1) + "\n")
        Console(width=140).print(sheet(results).table())
    DOCS.write_text(write_tables(DOCS.read_text(), "memory", lambda results: [sheet(results)]))


if __name__ == "__main__":
    main(sys.argv[1:])
