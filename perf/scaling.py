"""Write the numbers of the tables in docs/scaling.md again, from the estimate of `tunebook check`.

python perf/scaling.py
"""

import re
from pathlib import Path

from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from tunebook.tools.check import read_sharding
from tunebook.tools.memory import estimate
from tunebook.tools.workload import Batch, Workload

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
MODELS = {  # Llama-3.2-1B, Llama-3.1-8B, Qwen3-32B, Llama-3.1-70B
    "1B": LlamaConfig(
        **LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "32B": Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "70B": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}
# One packed row of 8,192 tokens. SFT: every token has a label. RM: four pairs, each side scored at its last token.
# DPO: four pairs, half of whose tokens are answers.
BATCHES = {task: Batch(1, 8192, scored, packed=True) for task, scored in {"sft": 8192, "rm": 8, "dpo": 4096}.items()}
ROW = re.compile(r"\| (\d+B) \| (\d+) \| (full|LoRA|QLoRA) \| `(\w+)` \| (\w+) \|.*")
CONTEXT_ROW = re.compile(r"\| (\d+B) \|( \d+ \|){4}")
LENGTHS = (8192, 32768, 131072)
ROOM = 40  # GB of activations that a GPU has room for at the last length


def adapter(task: str) -> LoraConfig:
    kind = "SEQ_CLS" if task == "rm" else "CAUSAL_LM"
    return LoraConfig(task_type=kind, r=32, lora_alpha=64, target_modules="all-linear")


def gigabytes(size: str, gpus: str, method: str, accelerate: str, reference: str, task: str) -> float:
    """Return the GB of one GPU at the peak of a step, for the run that a row of the table describes."""
    config: PreTrainedConfig = MODELS[size]
    workload = Workload(
        config,
        task,
        BATCHES[task],
        read_sharding(accelerate, int(gpus)),
        dtype="float32" if method == "full" else "bfloat16",
        mixed=True,
        bits=4 if method == "QLoRA" else 16,
        peft_config=None if method == "full" else adapter(task),
        accumulates=True,
        reference=config if task == "dpo" and reference == "kept" else None,
    )
    return sum(part.bytes for part in estimate(workload)) / 1e9


def activations(size: str, length: int) -> float:
    """Return the GB of SFT's activations on a packed row of this length."""
    batch, sharding = Batch(1, length, length, packed=True), read_sharding("zero3", 8)
    parts = estimate(Workload(MODELS[size], "sft", batch, sharding, mixed=True))
    return next(part.bytes for part in parts if part.name == "activations") / 1e9


def fill(line: str) -> str:
    """Return a line of the page, with new numbers if it is a row of a table."""
    if row := ROW.fullmatch(line):
        numbers = (f"{gigabytes(*row.groups(), task):.0f}" for task in BATCHES)
        return "| {} | {} | {} | `{}` | {} | ".format(*row.groups()) + " | ".join(numbers) + " |"
    if row := CONTEXT_ROW.fullmatch(line):
        numbers = [activations(row[1], length) for length in LENGTHS]
        size = next(c for c in (1, 2, 4, 8, 16, 32) if numbers[-1] / c < ROOM)
        return f"| {row[1]} | " + "".join(f"{number:.0f} | " for number in numbers) + f"{size} |"
    return line


if __name__ == "__main__":
    PAGE.write_text("\n".join(map(fill, PAGE.read_text().split("\n"))))
