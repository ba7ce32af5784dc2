"""Supervised fine-tuning.

accelerate launch --config_file configs/accelerate/zero3.yaml src/sft.py --config recipes/quickstart/sft.yaml
"""

import sys

from transformers import AutoModelForCausalLM
from trl import get_peft_config

from tunebook.models import load_model
from tunebook.recipe import Recipe, parse_command_line, report_mistakes
from tunebook.run import fit, prepare
from tunebook.trainers import SFTTrainer


def main(recipe: Recipe) -> SFTTrainer:
    _, training_args, model_args = recipe.args
    run = prepare(recipe)
    peft_config = get_peft_config(model_args)
    trainer = SFTTrainer(
        model=load_model(AutoModelForCausalLM, recipe, run.tokenizer, peft_config),
        args=training_args,
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        processing_class=run.tokenizer,
        peft_config=peft_config,
        record=run.record,
    )
    fit(trainer, run)
    return trainer


if __name__ == "__main__":
    with report_mistakes():
        main(parse_command_line("sft", sys.argv[1:]))
