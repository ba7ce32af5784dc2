"""Supervised fine-tuning.

accelerate launch --config_file configs/accelerate/zero3.yaml src/sft.py --config recipes/quickstart/sft.yaml
"""

import sys

from transformers import AutoModelForCausalLM

from tunebook.errors import exit_on_error
from tunebook.recipe import Recipe, parse_command_line
from tunebook.tools.check import check
from tunebook.training import SFTTrainer, fit, load_model, prepare


def main(recipe: Recipe) -> SFTTrainer:
    if recipe.training.dry_run:
        raise SystemExit(check(recipe))
    run = prepare(recipe)
    model, peft_config = load_model(AutoModelForCausalLM, recipe, run.tokenizer)
    trainer = SFTTrainer(
        model=model,
        args=recipe.training,
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        processing_class=run.tokenizer,
        peft_config=peft_config,
        record=run.record,
    )
    fit(trainer, run)
    return trainer


if __name__ == "__main__":
    with exit_on_error():
        main(parse_command_line("sft", sys.argv[1:]))
