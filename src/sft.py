"""Supervised fine-tuning.

accelerate launch --config_file configs/accelerate/zero3.yaml src/sft.py --config recipes/quickstart/sft.yaml
"""

# ruff: noqa: E402
import sys
from pathlib import Path

from tunebook.errors import end_on_signals, exit_on_error
from tunebook.recipe.words import answer_early

if __name__ == "__main__":  # before the libraries load
    end_on_signals()
    answer_early("sft", sys.argv[1:])

from transformers import AutoModelForCausalLM

from tunebook.recipe import Recipe, parse_command_line
from tunebook.recipe.configs import SFTConfig
from tunebook.tools.check import check
from tunebook.training import SFTTrainer, fit, held, load_model, prepare


def main(recipe: Recipe) -> SFTTrainer:
    if recipe.training.dry_run:
        raise SystemExit(check(recipe))
    assert isinstance(recipe.training, SFTConfig)
    with held(Path(recipe.training.output_dir)):
        run = prepare(recipe)
        model, peft_config = load_model(AutoModelForCausalLM, recipe, run.tokenizer, run.weights)
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
