"""A LoRA adapter merged into its base model: causal LMs, and reward models with their head."""

import logging
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

from ..errors import RecipeError
from ..files import whole_folder

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def merge(adapter: Path, out: Path, base: str | None = None, dtype: str = "float32") -> None:
    """Write the base model with the adapter merged into it, tokenizer included, to `out`, which appears complete or not
    at all. What was saved is loaded again and compared with the model that was trained.

    Args:
        adapter: folder of a PEFT adapter; its task type says whether it is a reward model's (SEQ_CLS).
        base: Hub id or folder of the base model. Default: what the adapter was trained on.
        dtype: of the merged weights: float32, bfloat16 or float16.

    Raises:
        RecipeError: for a folder without adapter, a folder `out` that exists, or outputs that differ: a merge into
            another base model, or a dtype too coarse for this adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise RecipeError(f"{adapter} holds no adapter (no adapter_config.json).")
    if out.exists():
        raise RecipeError(f"{out} exists. Name a new folder.")
    config = PeftConfig.from_pretrained(adapter)
    reward_model = config.task_type == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = load_base(base or config.base_model_name_or_path, config.revision, reward_model, tokenizer)
    peft_model = PeftModel.from_pretrained(model, adapter).eval()
    rows = tokenizer(
        ["A row to compare.", "Another, longer row to compare: 1 + 2 = 3."], padding=True, return_tensors="pt"
    )
    before = outputs(peft_model, rows)
    merged = peft_model.merge_and_unload().to(getattr(torch, dtype))

    with whole_folder(out) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = type(merged).from_pretrained(folder, dtype=merged.dtype)
        error = (outputs(reloaded, rows) - before).abs().max().item() / before.abs().max().item()
        if error > TOLERANCE[merged.dtype]:
            raise RecipeError(
                f"The merged model's outputs differ from the trained ones by {error:.1e} of their size "
                f"(at most {TOLERANCE[merged.dtype]:.0e} in {dtype}). Check --base, or merge in float32."
            )
    logger.info("%s merged into %s: outputs differ by %.1e of their size.", adapter, out, error)


def load_base(
    name: str, revision: str | None, reward_model: bool, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The base in float32, with rows for the tokens that were added in training."""
    architecture = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    with suppress_seqcls_warning():
        model = architecture.from_pretrained(
            name, revision=revision, dtype=torch.float32, **({"num_labels": 1} if reward_model else {})
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


@torch.inference_mode()
def outputs(model: torch.nn.Module, rows) -> torch.Tensor:
    return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.float()
