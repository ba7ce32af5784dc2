"""Score texts with a trained reward model."""

import json
import logging
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.layouts import choose_layout
from ..data.rendering import Renderer, RenderSettings
from ..data.sources import load_source
from ..errors import RecipeError, foreign
from ..following.pairs import render_ids, score_ids
from ..packing.forward import pack_reward_model
from ..training.models import check_model, load_reward_model

logger = logging.getLogger(__name__)


def load_scorer(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reward model that reads the reward at the last token of a row, whatever its pad token is.

    Raises:
        RecipeError: when it cannot be loaded.
    """
    check_model(name, "main", False, key="MODEL")
    with foreign(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = load_reward_model(name)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or 0
    pack_reward_model(model, packing=False)
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))  # type: ignore[arg-type] # hidden by a wrapper
    return model.eval(), tokenizer


def score_file(model_name: str, path: str, out: Path, batch_size: int = 8) -> int:
    """Write the rows of a file (messages, or prompt and completion, or text) to `out` as JSON lines, each with its
    `reward` and, when the model is calibrated, `normalized_reward` = (reward - mean) / std; return the number of rows.

    Raises:
        RecipeError: when the model or the file cannot be read, or a row cannot be scored (which one, and why).
    """
    model, tokenizer = load_scorer(model_name)
    rows = load_source(path, "train")
    renderer = Renderer(RenderSettings("sft", tokenizer, None, choose_layout("sft", rows.column_names, {})))
    rewards = score_ids(model, render_ids(rows, renderer, path), batch_size)
    if not_finite := [number for number, reward in enumerate(rewards) if not math.isfinite(reward)]:
        raise RecipeError(
            f"{path}, row {not_finite[0]}: the reward is {rewards[not_finite[0]]}, as are {len(not_finite)} of "
            f"{len(rewards)}. Look whether the weights of {model_name} are finite."
        )
    mean, std = (model.config.to_dict().get(name) for name in ("mean", "std"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for row, reward in zip(rows, rewards, strict=True):
            normalized = {"normalized_reward": (reward - mean) / std} if mean is not None and std else {}
            file.write(json.dumps({**row, "reward": reward, **normalized}, ensure_ascii=False) + "\n")
    logger.info("%d rewards in %s, from %.3f to %.3f.", len(rewards), out, min(rewards), max(rewards))
    return len(rewards)
