"""Transformers' own trainer with our keys, for tests of what follows a run."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from tunebook.recipe.configs import CausalLMConfig


@dataclass
class Arguments(CausalLMConfig, TrainingArguments):
    """Our keys on transformers' trainer."""


def make_trainer(model: Path, out: Path, **arguments) -> Trainer:
    """Three steps on 16 questions, and 4 of them for evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = Dataset.from_list([{"input_ids": tokenizer(f"Question: What is {i} + 2?").input_ids} for i in range(16)])
    defaults = {"use_cpu": True, "max_steps": 3, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2}
    batches = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    args = Arguments(output_dir=str(out), disable_tqdm=True, bf16=False, **{**defaults, **batches, **arguments})
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
