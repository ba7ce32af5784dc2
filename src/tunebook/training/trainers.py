"""TRL's trainers, on rows that are tokenized already, with exact resume, and with the objectives that TRL lacks."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import trl
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.reward_trainer import DataCollatorForPreference

from .. import checkpoints
from ..environment import launched_sharding
from ..errors import RecipeError, user_errors
from ..files import write_yaml
from ..following.scores import REWARDS_FILE
from ..packing import pack_causal_lm, pack_reward_model
from ..packing.batches import TokenBatchSampler, decides_sharing, pair_lengths
from ..packing.context_parallel import ContextParallelMixin
from .models import rename_head
from .objectives import DPOObjective, reward_loss
from .optimizers import MuonMixin
from .progress import ThroughputMixin

logger = logging.getLogger(__name__)


class RunMixin(MuonMixin, ContextParallelMixin):
    """Mixin before a TRL trainer that saves complete checkpoints only, and resumes at the sample where they stopped.

    Args:
        record: what the run is made of, for the checkpoints' manifests: model, data, seed, recipe.
    """

    def __init__(self, *args, record: Mapping[str, Any], **kwargs):
        self.record = record
        super().__init__(*args, **kwargs)
        # TRL 1.16 settles checkpointing under the names that transformers 5 reads no more: use_reentrant (ZeRO-3 with
        # LoRA), and for SFT a selective of its own, which would take the place of ours
        self.args.activation_checkpointing_kwargs = self.args.gradient_checkpointing_kwargs
        vars(self.model).pop("gradient_checkpointing_enable", None)

    @property
    def global_batch_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size

    def _save_checkpoint(self, model, trial) -> None:
        output_dir, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoints.saving(name, output_dir):
            if self.args.should_save:
                checkpoints.begin(output_dir / name)
            self.accelerator.wait_for_everyone()
            # the limit is ours to apply, once the new checkpoint is whole
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                epoch, step = divmod(self.state.global_step, self.steps_per_epoch)
                progress = {
                    "epoch": epoch,
                    "samples_in_epoch": step * self.global_batch_size,
                    "consumed_samples": self.state.global_step * self.global_batch_size,
                    "global_batch_size": self.global_batch_size,
                    "world_size": self.args.world_size,
                    "share_prefix": self.shares_prefix,
                }
                checkpoints.write_manifest(output_dir / name, {**self.record, **progress})
                checkpoints.rotate(output_dir, limit, self.args.save_total_gb, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """transformers goes on at the step's number. With another global batch size that is another sample: the step is
        counted anew from the samples."""
        self.steps_per_epoch = num_update_steps_per_epoch
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return position
        manifest = checkpoints.read_manifest(Path(resume_from_checkpoint))
        if manifest["global_batch_size"] == self.global_batch_size:
            return position
        steps, rest = divmod(manifest["samples_in_epoch"], self.global_batch_size)
        if rest:
            raise RecipeError(
                f"{resume_from_checkpoint} stopped after {manifest['samples_in_epoch']} samples of the epoch, which is "
                f"not a multiple of the new global batch size {self.global_batch_size}. Set global_batch_size: "
                f"{manifest['global_batch_size']}, or a divisor of {manifest['samples_in_epoch']}."
            )
        self.state.global_step = manifest["epoch"] * num_update_steps_per_epoch + steps
        return manifest["epoch"], steps * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args, **kwargs) -> None:
        """transformers 5.23 trains a finished run of `max_steps` one step further each time it is started again."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.lr_scheduler.last_epoch != self.state.global_step:
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            self.lr_scheduler.step()

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(self.record_card())

    def save_final(self) -> None:
        """Save the trained model, its card and the trainer's state to `output_dir`."""
        self.save_state()
        # off in training, wanted by who generates
        self.accelerator.unwrap_model(self.model).config.use_cache = True
        self.save_model(self.args.output_dir)
        self.create_model_card()

    def record_card(self) -> str:
        recipe = write_yaml(self.record["recipe"]).rstrip()
        rows = "\n".join(f"- {split}: {text}" for split, text in self.record["rows"].items())
        return f"\n## Recipe\n\n```yaml\n{recipe}\n```\n\n## Data\n\n{rows}\n"


@contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """Set values for the time that TRL reads them. Template, EOS token and loss mask are settled with
    the tokenizer and the rows; TRL 1.16 would settle them again, and refuse a mask on rows that are tokens already."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


class SFTTrainer(ThroughputMixin, RunMixin, trl.SFTTrainer):
    """TRL's SFTTrainer; its loss scores the labelled positions only, and packed rows need no flash-attn."""

    def __init__(self, *, args, **kwargs):
        settings = dict(assistant_only_loss=False, chat_template_path=None, eos_token=None, model_init_kwargs=None)
        with user_errors(), overridden(args, **settings):
            super().__init__(args=args, **kwargs)
        with user_errors():
            pack_causal_lm(self.model, packing=args.packing, context=self.context)

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, packing: bool, *rest) -> Dataset:
        if packing:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


class PairPackingMixin(ThroughputMixin, RunMixin):
    """Mixin of the two preference trainers: whether the prefix is shared, and batches of even packed length."""

    batches: TokenBatchSampler | None = None

    @cached_property
    def pair_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return pair_lengths(self.train_dataset, self.args.max_length)

    @cached_property
    def shares_prefix(self) -> bool:
        args = self.args
        if not args.packing:
            return False
        tokens, saved = self.pair_lengths
        share = saved.sum() / tokens.sum()
        decided = decides_sharing(args, share)
        logger.info(
            "Sharing the prefix of chosen and rejected saves %.1f%% of %s tokens: share_prefix is %s.",
            100 * share,
            f"{tokens.sum():,}",
            "on" if decided else "off",
        )
        return decided

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if not args.packing:
            return super()._get_train_sampler(train_dataset)
        tokens, saved = self.pair_lengths
        with user_errors():
            self.batches = TokenBatchSampler(
                tokens - saved * self.shares_prefix,
                rows_per_batch=None if args.max_tokens_per_batch else args.per_device_train_batch_size,
                max_tokens=args.max_tokens_per_batch,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                seed=args.seed if args.data_seed is None else args.data_seed,
                rank=args.process_index // args.context_parallel_size,
                world_size=args.data_parallel_size,
                drop_last=args.dataloader_drop_last,
            )
        return self.batches

    def _init_training_state(self, *args) -> tuple[int, int]:
        checkpoint = args[3]
        if checkpoint is not None and self.args.packing:
            manifest = checkpoints.read_manifest(Path(checkpoint))
            settings = {"global_batch_size": self.global_batch_size, "share_prefix": self.shares_prefix}
            if self.args.max_tokens_per_batch:
                settings["world_size"] = self.args.world_size
            for name, value in settings.items():
                if manifest[name] != value:
                    before, now = (str(x).lower() for x in (manifest[name], value))
                    raise RecipeError(
                        f"{checkpoint} was made with {name}: {before}, and its pairs balanced by tokens; with {now} "
                        f"their order is another. Set {'num_processes' if name == 'world_size' else name}: {before}."
                    )
        position = super()._init_training_state(*args)
        if self.batches is not None:  # transformers cannot reach it behind the batches that a resumed run skips
            self.batches.set_epoch(position[0])
        return position


@dataclass
class SubsetCollator(DataCollatorForPreference):
    """TRL's collator, which keeps the number of each pair's subset."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "subset" in examples[0]:
            batch["subset"] = torch.tensor([example["subset"] for example in examples])
        return batch


class RewardTrainer(PairPackingMixin, trl.RewardTrainer):
    """TRL's RewardTrainer with the reward read at the last token of a row whatever the pad token is, the loss in
    float32, a choice of losses, a margin that is asked for, the load-balancing loss of a mixture of experts, and exact
    accuracy, overall and by subset, in evaluation."""

    def __init__(self, *, args, processing_class, **kwargs):
        collator = SubsetCollator(processing_class.pad_token_id, args.pad_to_multiple_of)
        with user_errors(), overridden(args, chat_template_path=None, eos_token=None, model_init_kwargs=None):
            super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)
            if args.router_aux_loss_coef and "output_router_logits" not in self.model.config.to_dict():
                raise ValueError("`router_aux_loss_coef`: the model is no mixture of experts. Leave it out.")
        self.evaluated: list[torch.Tensor] = []
        with user_errors():
            pack_reward_model(self.model, args.packing, self.shares_prefix, self.context)

    def _prepare_dataset(self, dataset: Dataset, *rest) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "subset"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return [`reward_loss`], plus `router_aux_loss_coef` * the load-balancing loss."""
        metrics = self._metrics["train" if model.training else "eval"]
        args, margin, subset = self.args, inputs.pop("margin", 0.0), inputs.pop("subset", None)
        if args.router_aux_loss_coef:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits.float() if args.fp32_loss else outputs.logits
        chosen, rejected = logits.squeeze(-1).chunk(2)
        loss = reward_loss(chosen, rejected, margin, args)
        if args.router_aux_loss_coef:
            loss = loss + args.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss.detach()).mean().item())

        if model.training:
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        number = torch.zeros_like(chosen) if subset is None else subset.to(chosen.dtype)
        pairs = self.accelerator.gather_for_metrics(torch.stack([chosen.detach(), rejected.detach(), number], dim=1))
        rewards, difference = pairs[:, :2], pairs[:, 0] - pairs[:, 1]
        metrics["min_reward"].append(rewards.min().item())
        metrics["mean_reward"].append(rewards.mean().item())
        metrics["max_reward"].append(rewards.max().item())
        metrics["accuracy"].append((difference > 0).float().mean().item())
        metrics["margin"].append(difference.mean().item())
        if not model.training:
            self.evaluated.append(pairs.float().cpu())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        """TRL averages over batches; here every pair counts once, also in the last batch."""
        self.evaluated.clear()
        result = super().evaluation_loop(*args, **kwargs)
        pairs = torch.cat(self.evaluated)
        if self.is_world_process_zero():
            rewards = pd.DataFrame(pairs[:, :2].numpy(), columns=["chosen", "rejected"])
            rewards.to_csv(Path(self.args.output_dir, REWARDS_FILE), index=False)
        won, metrics = (pairs[:, 0] > pairs[:, 1]).float(), self._metrics["eval"]
        metrics["accuracy"], metrics["margin"] = [won.mean().item()], [(pairs[:, 0] - pairs[:, 1]).mean().item()]
        metrics["mean_reward"], metrics["std_reward"] = [pairs[:, :2].mean().item()], [pairs[:, :2].std().item()]
        if "subset" in self.eval_dataset.column_names:
            for number, name in enumerate(self.eval_dataset.features["subset"].names):
                if (pairs[:, 2] == number).any():
                    metrics[f"accuracy_{name}"] = [won[pairs[:, 2] == number].mean().item()]
        return result

    def save_final(self) -> None:
        if self.args.calibrate_rewards:
            self.calibrate()
        super().save_final()
        if self.args.value_head_prefix != "score" and self.is_world_process_zero():
            rename_head(Path(self.args.output_dir), self.args.value_head_prefix)

    def calibrate(self) -> None:
        """Write mean and std of the rewards of the last evaluation into the model's config, under OpenRLHF's names."""
        rewards = torch.cat(self.evaluated)[:, :2]
        config = self.accelerator.unwrap_model(self.model).config
        config.mean, config.std = rewards.mean().item(), max(rewards.std().item(), 1e-8)


@contextmanager
def offloaded_parameters(args) -> Iterator[None]:
    """`ref_offload` under ZeRO-3: the engine that TRL makes for the reference copies the run's DeepSpeed config, and
    TRL 1.16 has no argument to change the copy."""
    if not (args.ref_offload and launched_sharding(args).is_zero3):
        yield
        return
    plugin = args.deepspeed_plugin
    before = plugin.deepspeed_config["zero_optimization"].get("offload_param", {"device": "none"})
    plugin.deepspeed_config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    try:
        yield
    finally:  # in the copy that transformers has put in its place, which the policy's engine is made from
        plugin.deepspeed_config["zero_optimization"]["offload_param"] = before


class DPOTrainer(PairPackingMixin, trl.DPOTrainer):
    """TRL's DPOTrainer with the objectives that it lacks, see [`DPOObjective`]."""

    @property
    def reference_passes(self) -> int:
        return int(not self.args.precompute_ref_log_probs)

    def __init__(self, *, args, ref_model=None, **kwargs):
        self.patched = False
        with user_errors(), overridden(args, model_init_kwargs=None), offloaded_parameters(args):
            super().__init__(args=args, ref_model=ref_model, **kwargs)
        self._patch_forwards()
        self.settle_objective()

    def _prepare_dataset(self, dataset: Dataset, *rest) -> Dataset:
        return dataset

    def settle_objective(self) -> None:
        """Give TRL's loss what the recipe's objective is for it."""
        self.objective = DPOObjective.from_args(self.args)
        self.loss_types, self.loss_weights = self.objective.loss_types, self.objective.loss_weights
        self.label_smoothing = self.objective.label_smoothing

    def _patch_forwards(self) -> None:
        """Once TRL has put its fused head on both models; its constructor may already run the reference."""
        if not self.patched:
            self.patched = True
            for model in filter(None, (self.model, self.ref_model)):
                with user_errors():
                    pack_causal_lm(
                        self.accelerator.unwrap_model(model),
                        self.args.packing,
                        self.shares_prefix,
                        context=self.context,
                    )

    def _precompute_ref_logps(self, *args) -> Dataset:
        """TRL 1.16 finds those that it has cached by the rows and the model; they depend on `ld_alpha`, too."""
        self._patch_forwards()
        with overridden(self, _precompute_model_hash=(self._precompute_model_hash, self.args.ld_alpha)):
            return super()._precompute_ref_logps(*args)

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference model, on the device for the time of its pass where `ref_offload` keeps it on the CPU."""
        # ZeRO-3 and fsdp2_offload bring it layer by layer themselves; fsdp2 moves each rank's shards
        sharding = launched_sharding(self.args)
        offloads_itself = sharding.is_zero3 or (sharding.engine == "fsdp" and sharding.offload_weights)
        moves = self.args.ref_offload and not offloads_itself
        if moves:
            self.accelerator.unwrap_model(self.ref_model).to(self.accelerator.device)
        yield self.ref_model or self.model
        if moves:
            self.accelerator.unwrap_model(self.ref_model).to("cpu")

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's loss and metrics, with the reference computed here, and the policy's outputs kept for our terms."""
        if not self.precompute_ref_logps:
            with self.reference() as reference:
                chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        policy = []

        def recorded(*args, **kwargs):
            policy.append(model(*args, **kwargs))
            return policy[0]

        with overridden(self, precompute_ref_logps=True):
            result = super()._compute_loss(recorded, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        added, metrics = self.objective.added_terms(policy[0].log_probs, inputs, self.beta)
        for name, value in metrics.items():
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(value).mean().item())
        return (loss + added, outputs) if return_outputs else loss + added
