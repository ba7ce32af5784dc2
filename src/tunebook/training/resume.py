"""Checkpoints that are whole or absent, and runs that resume at the sample where their checkpoint stopped."""

import logging
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
import xxhash
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput

from .. import checkpoints
from ..data.loading import process
from ..data.rendering import RenderSettings
from ..errors import RecipeError, plain, user_errors
from ..files import write_yaml
from ..following.staging import StagingCallback
from ..packing.context_parallel import ContextParallelMixin
from .adapters import read_weights
from .finite import FiniteMixin
from .optimizers import MuonMixin
from .refusals import NO_BATCH
from .sharded import FSDPMixin

logger = logging.getLogger(__name__)

CARD = "README.md"


def is_on_hub(name: str) -> bool:
    """Return whether a model's name is one of the Hub, not a local folder's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


class RunMixin(FiniteMixin, MuonMixin, FSDPMixin, ContextParallelMixin):
    """Mixin before a TRL trainer that saves complete checkpoints only, and resumes at the sample where they stopped.

    Args:
        record: what the run is made of, for the checkpoints' manifests: model, data, seed, recipe.
    """

    loss_before = 0.0  # sum over the steps of earlier starts
    render_settings: RenderSettings | None = None  # of the training rows
    evaluated_step: int | None = None
    evaluation: dict[str, float]  # at that step
    loads_optimizer = True  # when it resumes
    settings: Sequence[dict[str, Any]] = ()  # of each group of the optimizer, by the recipe

    def __init__(self, *args: object, record: checkpoints.Record, **kwargs: object):
        with user_errors(ConnectionError, httpx2.HTTPError):  # `push_to_hub` makes the repository
            super().__init__(*args, **kwargs)
        if not self.args.bf16:
            # PATCH(trl<1.17): over a quantized model TRL makes bf16 of all that is trained. LoRA's layers take inputs
            # of any type; a whole module, such as a reward model's head, takes those of its own type only, unless
            # autocast is on. Waits for trl/trainer/reward_trainer.py:552. Delete when TRL casts adapters only.
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and ".modules_to_save." in name:
                    parameter.data = parameter.data.to(self.model.config.dtype)
        # PATCH(trl<1.17): TRL writes `gradient_checkpointing_kwargs`, which transformers 5 ignores (use_reentrant under
        # ZeRO-3 with LoRA would be lost), and SFTTrainer puts its own selective checkpointing in the place of ours.
        # Waits for trl/trainer/sft_trainer.py:1096. Delete when TRL uses `activation_checkpointing_kwargs`.
        self.args.activation_checkpointing_kwargs = self.args.gradient_checkpointing_kwargs
        vars(self.model).pop("gradient_checkpointing_enable", None)
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.args.logging_nan_inf_filter = False  # a loss that is not finite ends the run
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        shapes = [(name, *getattr(p, "ds_shape", p.shape)) for name, p in trained]  # ZeRO-3 leaves empty parameters
        self.record: checkpoints.Record = {**record, "parameters": xxhash.xxh3_64_hexdigest(str(shapes).encode())}

    @property
    def shares_prefix(self) -> bool:
        """Return whether chosen and rejected share their prefix."""
        return False

    @property
    def global_batch_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size

    def get_train_dataloader(self) -> DataLoader[Any]:
        batches = super().get_train_dataloader()
        if not len(batches):
            raise RecipeError(NO_BATCH)
        return batches

    def order_settings(self) -> dict[str, int]:
        """Return the settings, by their names in the manifest, that the order of the rows depends on."""
        return {}

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        # PATCH(transformers<5.25): the Trainer deletes older checkpoints before the manifest makes the new one whole,
        # and at the end of training the last one for the best, after which the run would train on from the best; so it
        # sees no limit. Waits for transformers/trainer.py:3425. Delete when rotation is a callback's.
        output_dir, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.check_weights()
        with checkpoints.saving(name, output_dir):
            if self.args.should_save:
                checkpoints.begin(output_dir / name)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:  # over PEFT's, which names the path of the base model
                shutil.copyfile(output_dir / CARD, output_dir / name / CARD)
            unlogged = self.accelerator.reduce(self._tr_loss, "mean").item()
            if self.args.should_save:
                loss = self.mean_loss(unlogged)
                checkpoints.write_manifest(output_dir / name, self.record, self.progress(), loss)
                best, staging = self.state.best_model_checkpoint, self.callback_handler.callbacks
                owing = {path for each in staging if isinstance(each, StagingCallback) for path in each.owing}
                checkpoints.rotate(output_dir, self.save_total_limit, self.args.save_total_gb, best, owing)
            self.accelerator.wait_for_everyone()

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, and check that there is the metric for the best model.

        Raises:
            RecipeError: there is not; before anything is saved by it.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]
        if eval_dataset is None and metric_key_prefix == "eval":
            self.evaluated_step, self.evaluation = self.state.global_step, dict(metrics)
        best = self.args.metric_for_best_model
        if self.is_in_train and metric_key_prefix == "eval" and best is not None:
            names = [name.removeprefix("eval_") for name in metrics]
            if best.removeprefix("eval_") not in names:
                raise RecipeError(f"`metric_for_best_model` {best}: the evaluation has {', '.join(names)}. Set one.")
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict on rows, tokenized or in the columns of the training rows."""
        output = super().predict(self.tokenized(test_dataset), ignore_keys, metric_key_prefix)
        vars(self)["_metrics"]["eval"].clear()  # or the next evaluation would log the mean of both
        return output

    def tokenized(self, rows: Dataset) -> Dataset:
        """Return rows that `evaluate` or `predict` is given as the trainer takes them, rendered like training rows."""
        if self.render_settings is None or {"input_ids", "chosen_ids"} & set(rows.column_names):
            return rows
        tokens, _ = process(rows, self.render_settings, name="rows to evaluate")
        return tokens.class_encode_column("subset") if "subset" in tokens.column_names else tokens

    def evaluate_final(self) -> dict[str, float]:
        """Return the evaluation of the final model, which may have been made at the last step."""
        is_last = not self.args.load_best_model_at_end or self.state.best_global_step == self.state.global_step
        return self.evaluation if is_last and self.evaluated_step == self.state.global_step else self.evaluate()

    def count_tokens(self) -> int:
        """Return the tokens that were trained on, over all processes and starts of the run."""
        return self._total_train_tokens

    def progress(self) -> checkpoints.Progress:
        """Return how far training has come, for a manifest."""
        epoch, step = divmod(self.state.global_step, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "samples_in_epoch": step * self.global_batch_size,
            "consumed_samples": self.state.global_step * self.global_batch_size,
            "global_batch_size": self.global_batch_size,
            "world_size": self.args.world_size,
            "share_prefix": self.shares_prefix,
            "num_tokens": self.count_tokens(),
        }

    def mean_loss(self, unlogged: float = 0.0) -> float:
        """Return the loss, averaged over the steps of all starts of the run."""
        return (self.loss_before + self._total_loss_scalar + unlogged) / max(self.state.global_step, 1)

    def log(self, logs: dict[str, float], *args: float | None) -> None:
        # PATCH(transformers<5.25): its `train_loss` is of the last start's steps. Waits for
        # transformers/trainer.py:2008. Delete when it is of the whole run.
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss()
        super().log(logs, *args)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        """Return epoch and micro-batch to resume at. transformers resumes at the step's number, which is a different
        sample under a different global batch size: count the step anew from the samples.

        Raises:
            RecipeError: the rows would come in a different order, or no step begins at the sample.
        """
        # PATCH(transformers<5.25): the Trainer has no public place to set where it resumes. Waits for
        # transformers/trainer.py:1678. Delete when it resumes at a sample.
        self.steps_per_epoch = num_update_steps_per_epoch
        log = logging.getLogger("transformers.trainer")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of what is set right below
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        log.setLevel(level)
        if resume_from_checkpoint is None:
            return position
        manifest = checkpoints.whole_manifest(Path(resume_from_checkpoint))
        if manifest.get("parameters") not in (None, self.record["parameters"]):
            raise RecipeError(f"{resume_from_checkpoint} trained other parameters. {checkpoints.SET_BACK}.")
        self.state.compute_steps(self.args, max_steps)
        self._find_best(Path(resume_from_checkpoint))
        for name, value in self.order_settings().items():
            if (other := manifest.get(name)) != value:
                before, now = str(other).lower(), str(value).lower()
                raise RecipeError(
                    f"{resume_from_checkpoint} was made with {name}: {before}, and its pairs balanced by tokens; with "
                    f"{now} they come in a different order. Set "
                    f"{'num_processes' if name == 'world_size' else name}: {before}."
                )
        self._total_train_tokens = manifest["num_tokens"]
        if manifest["global_batch_size"] != self.global_batch_size:
            position = self._resume_at_sample(manifest, resume_from_checkpoint, num_update_steps_per_epoch)
        self.loss_before = manifest["train_loss"] * self.state.global_step
        return position

    def _resume_at_sample(
        self, manifest: checkpoints.Manifest, resume_from_checkpoint: str, num_update_steps_per_epoch: int
    ) -> tuple[int, int]:
        samples = manifest["samples_in_epoch"]
        steps, rest = divmod(samples, self.global_batch_size)
        if rest:
            raise RecipeError(
                f"{resume_from_checkpoint} stopped after {samples} samples of the epoch, which is not a multiple of "
                f"the new global batch size {self.global_batch_size}. Set global_batch_size: "
                f"{manifest['global_batch_size']}, or a divisor of {samples}."
            )
        self.state.global_step = manifest["epoch"] * num_update_steps_per_epoch + steps
        return manifest["epoch"], steps * self.args.gradient_accumulation_steps

    def _find_best(self, checkpoint: Path) -> None:
        """Set the best checkpoint, whose path may be that of another folder: of a run that was moved or copied. The
        best evaluation may also be at a step of which there never was a checkpoint."""
        state = self.state
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        if state.best_global_step is None or saved is None:
            return
        path = checkpoint.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        manifest = checkpoints.complete_manifest(path)
        if manifest is not None and manifest.get("engine") == self.record["engine"]:
            state.best_model_checkpoint = str(path)
            return
        text = "The best checkpoint, %s, is not there any more, or another launch's. The best is sought from here on."
        logger.warning(text, path)
        state.best_model_checkpoint = state.best_global_step = state.best_metric = None

    def create_optimizer(self, model: PreTrainedModel | PeftModel | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            self.settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # PATCH(transformers<5.25): the Trainer would load weights that are in the model already. Waits for
        # transformers/trainer.py:1564. Delete when weights and the optimizer's state are loaded apart.
        if self.loads_optimizer:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader[Any]]:
        # PATCH(transformers<5.25): each engine loads weights together with an optimizer's state that it saved itself,
        # so those of another launch are in the model before it is sharded. Waits for transformers/trainer.py:1809.
        # Delete when they are loaded apart.
        if resume_from_checkpoint is None or self.loads_optimizer:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if isinstance(model := self.accelerator.unwrap_model(self.model), PeftModel):
            read_weights(model, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # PATCH(transformers<5.25): optimizer and schedule resume with the checkpoint's settings, whatever the recipe
        # says now, and at its step, whatever the new batch size makes of it. Waits for transformers/trainer.py:3894.
        # Delete when it resumes at a sample, with the settings of its arguments.
        if checkpoint is None:
            return
        if self.loads_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        before = checkpoints.whole_manifest(Path(checkpoint)).get("learning_rate", self.args.learning_rate)
        for group, settings in zip(self.optimizer.param_groups, self.settings, strict=False):
            scale = settings["lr"] / group["initial_lr"] if "initial_lr" in group else self.args.learning_rate / before
            group |= {**settings, "lr": group["lr"] * scale}
            group |= {"initial_lr": settings["lr"]} if "initial_lr" in group else {}
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # no step of a new optimizer before
                self.lr_scheduler.step()

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        # PATCH(transformers<5.25): a finished run, of `max_steps` or ended early, is trained one step further each time
        # it is started again. Waits for transformers/trainer.py:1827. Delete when the epoch's loop checks both first.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def save_final(self) -> None:
        """Save the trained model, its card and the trainer's state to `output_dir`."""
        self.check_weights()
        self.save_state()
        # off in training; who generates wants it on
        self.accelerator.unwrap_model(self.model).config.use_cache = True
        self.save_model(self.args.output_dir)
        self.create_model_card()

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write TRL's model card, with the recipe and the counts of rows, under the name of the Hub or the folder. A
        base model that is not on the Hub is named by its folder, without the path."""
        if not self.is_world_process_zero():
            return
        output_dir, base = Path(self.args.output_dir), self.record["model"]
        model_name = (self.args.hub_model_id or output_dir.resolve().name).split("/")[-1]
        super().create_model_card(*args, **{**kwargs, "model_name": model_name})  # type: ignore[arg-type]
        card = ModelCard.load(output_dir / CARD)
        if not is_on_hub(base):
            base, card.data.base_model = Path(base).resolve().name, None
            card.text = re.sub(r"\[.*\]\(https://huggingface.co/.*\)", f"`{base}`", card.text, count=1)
        card.data.library_name = "peft" if isinstance(self.model, PeftModel) else "transformers"
        card.text = card.text.replace('model="None"', f'model="{self.args.hub_model_id or model_name}"')
        recipe = write_yaml(self.record["recipe"]).rstrip()
        rows = "\n".join(f"- {split}: {plain(text)}" for split, text in self.record["rows"].items())
        # Tildes, since a chat template may hold a fence of backticks; more of them than stand in the recipe
        fence = "~" * max(4, *(len(run) + 1 for run in re.findall("~+", recipe) or [""]))
        card.text += f"\n\n## Recipe\n\n{fence}yaml\n{recipe}\n{fence}\n\n## Data\n\n{rows}\n"
        card.save(output_dir / CARD)
