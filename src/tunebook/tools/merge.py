"""Merge a LoRA adapter into its base model: causal LMs, and reward models with their head."""

import logging
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding
from trl.trainer.reward_trainer import suppress_seqcls_warning

from ..errors import RecipeError
from ..files import whole_folder
from ..training.models import put_adapter

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
            a different base model, or a dtype too coarse for this adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise RecipeError(f"{adapter} holds no adapter (no adapter_config.json).")
    if out.exists():
        raise RecipeError(f"{out} exists. Name a new folder.")
    config, tokenizer = PeftConfig.from_pretrained(str(adapter)), AutoTokenizer.from_pretrained(adapter)
    name, options = base or config.base_model_name_or_path, {"revision": config.revision, "dtype": torch.float32}
    with suppress_seqcls_warning():
        if config.task_type == "SEQ_CLS":
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    model = put_adapter(model, str(adapter)).eval()
    texts = ["A row to compare.", "Another, longer row to compare: 1 + 2 = 3."]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    before = outputs(model, rows)
    model = model.merge_and_unload().to(getattr(torch, dtype))

    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder, dtype=model.dtype)
        error = (outputs(reloaded, rows) - before).abs().max().item() / before.abs().max().item()
        if error > TOLERANCE[model.dtype]:
            raise RecipeError(
                f"The merged model's outputs differ from the trained ones by {error:.1e} of their size "
                f"(at most {TOLERANCE[model.dtype]:.0e} in {dtype}). Check --base, or merge in float32."
            )
    logger.info("%s merged into %s: outputs differ by %.1e of their size.", adapter, out, error)


@torch.inference_mode()
def outputs(model: torch.nn.Module, rows: BatchEncoding) -> torch.Tensor:
    """Return the logits of rows, in float32."""
    return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.float()
