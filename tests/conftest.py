"""Tiny models and data that every test can use: offline, no token, no GPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
if not any("tests/gpu" in word for word in sys.argv):  # the other tests give the same numbers everywhere
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tunebook import run_script
from tunebook.files import read_yaml

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is two plus three? five. one and four make five too."]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """No test reads or writes the user's caches."""
    import datasets

    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def build_tokenizer(special=("<pad>", "<|im_start|>", "<|im_end|>"), template: str | None = TEMPLATE):
    """Byte-level BPE trained on a few words; EOS and pad are the last and the first special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[0])
    fast.chat_template = template
    return fast


def build_model(vocab_size: int, config_class: type = LlamaConfig, **changes):
    """A random causal model of 2 layers, of the architecture of its configuration's class."""
    torch.manual_seed(0)
    config = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return AutoModelForCausalLM.from_config(config_class(**config | changes))


def save_model(folder: Path, model, tokenizer) -> Path:
    """Saves a model and its tokenizer; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """A folder with a random Llama of 2 layers and its tokenizer with ChatML."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", build_model(len(tokenizer)), tokenizer)


def read_cases(name: str):
    """The tables of a test, from a YAML file in this folder."""
    return read_yaml((ROOT / "tests" / name).read_text(), name)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(i: int) -> str:
    return f"what is {i} plus {i % 7}?"


@pytest.fixture(scope="session")
def sft_rows(tmp_path_factory) -> Path:
    """48 prompts and completions of different lengths."""
    rows = [{"prompt": question(i) + " ", "completion": "five " * (1 + i % 5) + str(i)} for i in range(48)]
    return write_rows(tmp_path_factory.mktemp("data") / "sft.jsonl", rows)


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory) -> Path:
    """48 preference pairs of different lengths, with a margin and a subset."""
    rows = [
        {
            "prompt": question(i) + " ",
            "chosen": "five " * (1 + i % 5) + "good",
            "rejected": "one " * (1 + i % 3) + "bad",
            "margin": i % 4 / 2,
            "subset": "easy" if i % 3 else "hard",
        }
        for i in range(48)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture
def task_rows(task: str, sft_rows, pair_rows) -> Path:
    """The rows for the parameter `task` of a test."""
    return sft_rows if task == "sft" else pair_rows


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(script: str, *arguments, config: str = "cpu", processes: int = 1, **flags) -> list[str]:
    """`accelerate launch SCRIPT ARGUMENTS` as a user would write it; `flags` are the launcher's."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{config}.yaml"]
    flags = {"num_processes": processes, "main_process_port": free_port(), **flags}
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*command, script, *map(str, arguments)]


def launch(script: str, *arguments, config: str = "cpu", processes: int = 1, timeout: int = 300, **popen):
    """Runs [`launch_command`]; returns the finished process. A script finds the modules of src/ and tests/."""
    command = launch_command(script, *arguments, config=config, processes=processes)
    env = dict(popen.pop("env", os.environ))
    env["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT / 'tests'}:{env.get('PYTHONPATH', '')}"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=env, **popen)


def launch_runs(runs: list[tuple[str, dict]], config: str, processes: int) -> subprocess.CompletedProcess:
    """Runs of a task and its recipe, one after the other in the same processes, which take half a minute to start."""
    done = launch("tests/runs.py", json.dumps(runs), config=config, processes=processes, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def short_recipe(model: Path, rows: Path, output_dir: Path, **changes) -> dict:
    """The keys of a short run on the CPU that saves no checkpoint; a change to None takes a key away."""
    keys = {
        "model_name_or_path": str(model),
        "dataset_name": str(rows),
        "output_dir": str(output_dir),
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return {name: value for name, value in (keys | changes).items() if value is not None}


def train(task: str, model: Path, rows: Path, output_dir: Path, **changes):
    """Trains [`short_recipe`] with the task's script; returns the trainer."""
    return run_script(task, short_recipe(model, rows, output_dir, **changes))


def logged(trainer, name: str) -> list[float]:
    """The values of a key of the trainer's log, in their order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def copy_until(step: int, run: Path, copy: Path) -> None:
    """Copies the folder of a run without the checkpoints after a step."""
    shutil.copytree(run, copy)
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)


def assert_same_weights(one: Path, other: Path) -> None:
    """The models, or adapters, in two folders are equal to the bit."""
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, other))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def options(recipe: dict) -> list[str]:
    """A recipe's keys as command-line arguments."""
    return [
        part
        for name, value in recipe.items()
        for part in (f"--{name}", json.dumps(value) if not isinstance(value, str) else value)
    ]
