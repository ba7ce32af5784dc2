"""Training a reward model on preference pairs.

accelerate launch --config_file configs/accelerate/zero3.yaml src/rm.py --config recipes/quickstart/rm.yaml
"""

import sys

from transformers import AutoModelForSequenceClassification
from trl import get_peft_config

from tunebook.models import load_model
from tunebook.recipe import Recipe, parse_command_line, report_mistakes
from tunebook.rewards import pair_benchmarks
from tunebook.run import fit, prepare
from tunebook.trainers import RewardTrainer


def main(recipe: Recipe) -> RewardTrainer:
    script_args, training_args, model_args = recipe.args
    run = prepare(recipe)
    peft_config = get_peft_config(model_args)
    trainer = RewardTrainer(
        model=load_model(AutoModelForSequenceClassification, recipe, run.tokenizer, peft_config),
        args=training_args,
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        processing_class=run.tokenizer,
        peft_config=peft_config,
        record=run.record,
    )
    if training_args.benchmarks:
        trainer.add_callback(pair_benchmarks(trainer, run.tokenizer, training_args.benchmarks, script_args))
    fit(trainer, run)
    return trainer


if __name__ == "__main__":
    with report_mistakes():
        main(parse_command_line("rm", sys.argv[1:]))
