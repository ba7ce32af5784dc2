"""Make the rows and the small model of the comparison. The same seed gives the same rows."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Each word is one token in SmolLM2's vocabulary and in the small model's
WORDS = (
    "the of and to in is that for it as was with on are by be this from at have or an not which one two three four "
    "five six seven eight nine ten many more each how if then has total number money day week year hour first last "
    "left made gave took sold book school family water food house small large half time people work cost"
).split()
VOCABULARY = 8192

# Mean and standard deviation of the logarithm of the number of SmolLM2's tokens in GSM8K: questions and answers of the
# training split (7,473 rows), and the three columns of the preferences (1,637 pairs)
QUESTION, ANSWER = (4.04, 0.35), (4.74, 0.42)
PROMPT, CHOSEN, REJECTED = (4.13, 0.34), (4.91, 0.38), (4.84, 0.41)

Rows = list[dict[str, str]]
Length = Callable[[], float]


def write(rows: Rows, folder: Path) -> Path:
    """Write one file into a folder and return it. TRL's scripts read the folder, tunebook's the file."""
    folder.mkdir(parents=True)
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path, count: int, generator: np.random.Generator) -> Rows:
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [rows[i] for i in generator.choice(len(rows), size=count, replace=count > len(rows))]


def gsm8k(count: int, folder: Path | None = None, seed: int = 0) -> Rows:
    """Return questions and answers from `folder`/train.jsonl, or words of the same lengths."""
    generator = np.random.default_rng(seed)
    if folder is None:
        return answers(count, lognormal(generator, *QUESTION), lognormal(generator, *ANSWER), generator)
    rows = read(folder / "train.jsonl", count, generator)
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]


def gsm8k_preferences(count: int, folder: Path | None = None, seed: int = 0) -> Rows:
    """Return right and wrong answers from `folder`/preferences.jsonl, or words of the same lengths."""
    generator = np.random.default_rng(seed)
    if folder is None:
        lengths = (lognormal(generator, *column) for column in (PROMPT, CHOSEN, REJECTED))
        return pairs(count, *lengths, generator)
    rows = read(folder / "preferences.jsonl", count, generator)
    return [{**row, "prompt": row["prompt"] + "\n"} for row in rows]


def long_tail(count: int, folder: Path | None = None, seed: int = 0) -> Rows:
    """Return mostly short answers, and a few of up to 900 words."""
    generator = np.random.default_rng(seed)
    tail = lognormal(generator, 4.5, 1.0)
    return answers(count, partial(generator.integers, 20, 60), lambda: min(tail(), 900), generator)


def shared_prompts(count: int, folder: Path | None = None, seed: int = 0) -> Rows:
    """Return pairs of short answers to long prompts."""
    generator = np.random.default_rng(seed)
    answer = partial(generator.integers, 20, 60)
    return pairs(count, partial(generator.integers, 400, 700), answer, answer, generator)


def short(count: int, like: dict[str, str]) -> Rows:
    """Return rows of one word per column, for a step that is not timed."""
    return [dict.fromkeys(like, "one ")] * count


def equal_lengths(count: int, length: int, seed: int = 0) -> Rows:
    """Return rows of `length` tokens of the small model: prompt, completion and EOS."""
    generator = np.random.default_rng(seed)
    return answers(count, lambda: length // 2, lambda: length - length // 2 - 1, generator)


def answers(count: int, prompt: Length, completion: Length, generator: np.random.Generator) -> Rows:
    return [
        {"prompt": text(prompt(), generator) + "\n", "completion": text(completion(), generator)} for _ in range(count)
    ]


def pairs(count: int, prompt: Length, chosen: Length, rejected: Length, generator: np.random.Generator) -> Rows:
    return [
        {
            "prompt": text(prompt(), generator) + "\n",
            "chosen": text(chosen(), generator),
            "rejected": text(rejected(), generator),
        }
        for _ in range(count)
    ]


def lognormal(generator: np.random.Generator, mean: float, deviation: float) -> Length:
    return partial(generator.lognormal, mean, deviation)


def text(words: float, generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, size=max(1, round(words))))


def save_small_model(folder: Path, **changes) -> None:
    """Save a random Llama of 10M parameters and a tokenizer of whole words. `changes` go into the config."""
    words = {token: i for i, token in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = dict(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=6,
        num_attention_heads=5,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=words["<pad>"],
        eos_token_id=words["<eos>"],
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
