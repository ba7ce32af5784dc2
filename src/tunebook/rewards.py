"""Rewards of texts by a trained reward model."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import pad

from .callbacks import PairAccuracyCallback
from .data import load_source
from .generations import map_over_ranks
from .models import load_reward_model
from .packing import pack_reward_model
from .recipe import RecipeError
from .rows import Dropped, Renderer, Rendering, choose_columns, tokenize

logger = logging.getLogger(__name__)


@torch.inference_mode()
def score_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int = 8) -> list[float]:
    """The reward of each row of token ids, read at its last token. Rows of like length are batched together."""
    pad_id, device = model.config.get_text_config().pad_token_id, model.device
    rewards = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        batch = by_length[start : start + batch_size]
        # A model in training may share prefixes between the halves of a batch, so there are two
        ids = [torch.tensor(rows[i]) for i in batch + batch[-1:] * (len(batch) % 2)]
        logits = model(
            input_ids=pad(ids, padding_value=pad_id).to(device),
            attention_mask=pad([torch.ones_like(row) for row in ids], padding_value=0).to(device),
            use_cache=False,
        ).logits
        for i, reward in zip(batch, logits[: len(batch), 0].float().tolist(), strict=True):
            rewards[i] = reward
    return rewards


def load_scorer(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model that reads the reward at the last token of a row, whatever its pad token is."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = load_reward_model(name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or 0
    pack_reward_model(model, packing=False)
    return model.eval(), tokenizer


def render(rows: Sequence[dict], renderer: Renderer, name: str) -> list[list[int]]:
    """Token ids of rows.

    Raises:
        RecipeError: for a row that has no text (which one, and why).
    """
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(renderer.sft(row))
        except Dropped as reason:
            raise RecipeError(f"{name}, row {number}: {reason}.") from reason
    return [ids for ids, _ in tokenize(texts, renderer.how.tokenizer)]


def pair_benchmarks(
    trainer, tokenizer: PreTrainedTokenizerBase, paths: Sequence[str], script_args
) -> PairAccuracyCallback:
    """Accuracy by subset on files of pairs (RewardBench's layout), at every evaluation, as text like the training rows.

    Raises:
        RecipeError: for a file that cannot be read or has no such pairs.
    """
    renderer = Renderer(
        Rendering(
            "sft",
            tokenizer,
            None,
            {"prompt": "prompt", "completion": "completion"},
            prompt_template=script_args.prompt_template,
            system_prompt=script_args.system_prompt,
            apply_chat_template=script_args.apply_chat_template,
        )
    )
    batch_size = trainer.args.per_device_eval_batch_size
    benchmarks = {Path(path).stem: load_source(path, "train") for path in paths}
    for name, pairs in benchmarks.items():
        if missing := {"prompt", "chosen", "rejected"} - set(pairs.column_names):
            raise RecipeError(f"`benchmarks`: {name} has no column {' and '.join(sorted(missing))}.")

    def score_share(items: list[tuple]) -> list[float]:
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in items]
        was_training = trainer.model.training
        rewards = score_ids(trainer.model.eval(), render(rows, renderer, "benchmark"), batch_size)
        trainer.model.train(was_training)
        return rewards

    def score(items: list[tuple]) -> list[float]:
        if trainer.args.context_parallel_size > 1:  # ranks that share a packed row need the same items
            return score_share(items)
        return map_over_ranks(trainer.accelerator, score_share, items)

    return PairAccuracyCallback(trainer, {name: pairs.to_list() for name, pairs in benchmarks.items()}, score)


def score_file(model_name: str, path: str, out: Path, batch_size: int = 8) -> int:
    """Write the rows of a file (messages, or prompt and completion, or text) to `out` as JSON lines, each with its
    `reward` and, when the model is calibrated, `normalized_reward` = (reward - mean) / std. Returns the number of rows.

    Raises:
        RecipeError: when the model or the file cannot be read, or a row cannot be scored (which one, and why).
    """
    model, tokenizer = load_scorer(model_name)
    rows = load_source(path, "train")
    renderer = Renderer(Rendering("sft", tokenizer, None, choose_columns("sft", rows.column_names, {})))
    rewards = score_ids(model, render(rows, renderer, path), batch_size)
    mean, std = (model.config.to_dict().get(name) for name in ("mean", "std"))
    with open(out, "w", encoding="utf-8") as file:
        for row, reward in zip(rows, rewards, strict=True):
            normalized = {"normalized_reward": (reward - mean) / std} if std else {}
            file.write(json.dumps({**row, "reward": reward, **normalized}, ensure_ascii=False) + "\n")
    logger.info("%d rewards in %s, from %.3f to %.3f.", len(rewards), out, min(rewards), max(rewards))
    return len(rewards)
