"""TRL's trainers, on rows that are tokenized already, with exact resume and the objectives that TRL lacks."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import FusedCausalLMOutput

from ..checkpoints import Record, optional
from ..environment import launched_sharding
from ..errors import user_errors
from ..following.scores import REWARDS_FILE
from ..packing import pack_causal_lm, pack_reward_model
from ..packing.batches import TokenBatchSampler, decides_sharing, drop_unlabelled, pair_lengths
from ..packing.dropout import turn_off_dropout
from ..packing.forward import RewardOutput
from ..recipe.configs import DPOConfig, RewardConfig, SFTConfig
from .adapters import StartingWeights
from .collators import LayoutCollator, SubsetCollator
from .models import rename_head
from .objectives import DPOObjective, pair_metrics, reward_loss
from .progress import ThroughputMixin
from .resume import RunMixin
from .sharded import offloaded_parameters, settle_trained, sharding_by_layer

logger = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]


@contextmanager
def overridden(args: object, **values: object) -> Iterator[None]:
    """Set attributes of `args` while TRL reads them."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


# PATCH(trl<1.17): TRL's constructors settle template, EOS token and loss mask again, and refuse a mask on rows that are
# tokens already, so they must not see these keys. Waits for trl/trainer/sft_trainer.py:728. Delete when TRL takes
# tokenized rows as they are.
SETTLED = {"model_init_kwargs": None, "chat_template_path": None, "eos_token": None}


class SFTTrainer(ThroughputMixin, RunMixin, trl.SFTTrainer):
    """TRL's SFTTrainer: the cross-entropy of the labelled tokens, averaged over those of the step. It scores the
    labelled positions only, and packed rows need no flash-attn."""

    args: SFTConfig

    def __init__(self, *, args: SFTConfig, record: Record, **kwargs: object):
        with user_errors():
            with overridden(args, assistant_only_loss=False, **SETTLED):
                super().__init__(args=args, record=record, **kwargs)
            pack_causal_lm(self.model, packing=args.packing, context=self.context)
        self.data_collator = LayoutCollator(self.data_collator, args.packing, share_prefix=False)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: object, args: trl.SFTConfig, packing: bool, *rest: object
    ) -> Dataset:
        # PATCH(trl<1.17): TRL walks through tokenized rows one by one; of that only packing is wanted. Waits for
        # trl/trainer/sft_trainer.py:1228. Delete when rows with input_ids and labels are taken as they are.
        dataset = self.tokenized(dataset)
        if packing:
            packed = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)  # type: ignore[arg-type]
            return drop_unlabelled(packed)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


class PairPackingMixin(ThroughputMixin, RunMixin):
    """Mixin of the two preference trainers: whether the prefix is shared, and batches of even packed length."""

    args: RewardConfig | DPOConfig
    batches: TokenBatchSampler | None = None
    rewards: torch.Tensor  # of both sides of the last batch: (pairs, 2); implicit ones in DPO
    evaluated: list[torch.Tensor]  # of each batch of an evaluation: (pairs, 2 or more), the rewards of both sides

    def _prepare_dataset(self, dataset: Dataset, *rest: object) -> Dataset:
        # PATCH(trl<1.17): TRL walks through tokenized pairs one by one, and drops other columns. Waits for
        # trl/trainer/dpo_trainer.py:1036. Delete when rows with token ids are taken as they are.
        return self.tokenized(dataset)

    def log(self, logs: dict[str, float], *args: float | None) -> None:
        """Log, and only now read what was measured: to read it at once, each micro-batch would wait for the GPU."""
        for values in vars(self)["_metrics"]["train" if self.model.training else "eval"].values():
            values[:] = map(float, values)
        super().log(logs, *args)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the loss and, to predict, the rewards of both sides, (pairs, 2). TRL's outputs are logits of twice as
        many rows, of which the Trainer drops some in the last batch, and DPO has none."""
        loss, *_ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, None if prediction_loss_only else self.rewards, None

    @cached_property
    def pair_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return pair_lengths(self.train_dataset, self.args.max_length)

    @cached_property
    def shares_prefix(self) -> bool:
        if not self.args.packing:
            return False
        tokens, saved = self.pair_lengths
        share = saved.sum() / tokens.sum()
        decided = decides_sharing(self.args, share)
        logger.info(
            "Sharing the prefix of chosen and rejected saves %.1f%% of %s tokens: share_prefix is %s.",
            *(100 * share, f"{tokens.sum():,}", "on" if decided else "off"),
        )
        return decided

    def order_settings(self) -> dict[str, int]:
        args = self.args
        settings = {"global_batch_size": self.global_batch_size, "share_prefix": self.shares_prefix}
        if args.max_tokens_per_batch:
            settings["world_size"] = args.world_size
        return settings if args.packing else {}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int] | None:
        # PATCH(transformers<5.25): the Trainer takes batches instead of rows only from this method, as a
        # BatchRebalanceSampler. Waits for transformers/trainer.py:1038. Delete when it takes a batch sampler.
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

    def _init_training_state(self, *args: object, **kwargs: object) -> tuple[int, int]:
        # PATCH(transformers<5.25): the Trainer cannot reach a batch sampler's epoch behind the batches that a resumed
        # run skips. Waits for transformers/trainer.py:1678. Delete when it sets the epoch of what it wraps.
        position = super()._init_training_state(*args, **kwargs)  # type: ignore[arg-type]
        if self.batches is not None:
            self.batches.set_epoch(position[0])
        return position


class RewardTrainer(PairPackingMixin, trl.RewardTrainer):
    """TRL's RewardTrainer with the losses of [`reward_loss`] in float32, the reward read at the last token of a row
    whatever the pad token is, a margin only on request, and exact accuracy, overall and by subset, in evaluation.

    With `router_aux_loss_coef` c it adds c times the load-balancing loss of a mixture of experts (Switch Transformers,
    https://arxiv.org/abs/2101.03961, equations 4 to 6), over all layers, as transformers' Mixtral has it.
    """

    args: RewardConfig
    unread_tokens: torch.Tensor | int = 0  # of the steps since they were read

    def __init__(
        self, *, args: RewardConfig, processing_class: PreTrainedTokenizerBase, record: Record, **kwargs: object
    ):
        self.evaluated: list[torch.Tensor] = []  # of each batch, (pairs, 3): both rewards and the number of the subset
        collator = SubsetCollator(processing_class.pad_token_id, args.pad_to_multiple_of)  # type: ignore[arg-type]
        with user_errors():
            with overridden(args, **SETTLED):
                super().__init__(
                    args=args, processing_class=processing_class, data_collator=collator, record=record, **kwargs
                )
            if args.disable_dropout:
                turn_off_dropout(self.model)
            pack_reward_model(self.model, args.packing, self.shares_prefix, self.context)
        self.data_collator = LayoutCollator(self.data_collator, args.packing, self.shares_prefix)

    def count_tokens(self) -> int:
        self._total_train_tokens += int(self.unread_tokens)
        self.unread_tokens = 0
        return super().count_tokens()

    def log(self, logs: dict[str, float], *args: float | None) -> None:
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self.count_tokens()]
        super().log(logs, *args)

    def _set_signature_columns_if_needed(self) -> None:
        # PATCH(trl<1.17): TRL's list of columns has no subset. Waits for trl/trainer/reward_trainer.py:744. Delete when
        # the columns follow from the collator.
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "subset"]  # type: ignore[assignment]

    def compute_loss(
        self, model: torch.nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> torch.Tensor | tuple[torch.Tensor, RewardOutput]:
        """Return [`reward_loss`], plus `router_aux_loss_coef` * the load-balancing loss."""
        metrics = self._metrics["train" if model.training else "eval"]
        args, margin, subset = self.args, inputs.pop("margin", 0.0), inputs.pop("subset", None)
        options = {"output_router_logits": True} if args.router_aux_loss_coef else {}
        outputs = model(**inputs, **options, use_cache=False)
        logits = outputs.logits.float() if args.fp32_loss else outputs.logits
        chosen, rejected = logits.squeeze(-1).chunk(2)
        loss = reward_loss(chosen, rejected, margin, args)
        if args.router_aux_loss_coef:
            loss = loss + args.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss.detach()).mean())

        if model.training:
            self.unread_tokens = self.unread_tokens + self.accelerator.gather(inputs["attention_mask"].sum()).sum()
        self.rewards = torch.stack([chosen, rejected], dim=1).detach()
        number = torch.zeros_like(chosen) if subset is None else subset.to(chosen.dtype)
        pairs = self.accelerator.gather_for_metrics(torch.cat([self.rewards, number[:, None]], dim=1))
        rewards = pairs[:, :2]
        logged = {"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()}
        logged |= pair_metrics(pairs)
        for name, value in logged.items():
            metrics[name].append(value)
        if not model.training:
            self.evaluated.append(pairs.float().cpu())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self, dataloader: DataLoader[dict[str, Any]], *args: object, **kwargs: object
    ) -> EvalLoopOutput:
        """Evaluate with every pair counted once, also those of the last batch; TRL averages over batches."""
        before, self.evaluated = self.evaluated, []
        result = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[arg-type]
        pairs, metrics = torch.cat(self.evaluated), self._metrics["eval"]
        if kwargs.get("metric_key_prefix") != "eval":  # a prediction, or one of several sets
            self.evaluated = before
        elif self.is_world_process_zero():
            rewards = pd.DataFrame(pairs[:, :2].numpy(), columns=["chosen", "rejected"])
            with optional(REWARDS_FILE):
                rewards.to_csv(Path(self.args.output_dir, REWARDS_FILE), index=False)
        metrics |= {name: [value.item()] for name, value in pair_metrics(pairs).items()}
        metrics["mean_reward"], metrics["std_reward"] = [pairs[:, :2].mean().item()], [pairs[:, :2].std().item()]
        if "subset" in (features := cast(Dataset, dataloader.dataset).features):
            for number, name in enumerate(features["subset"].names):
                if (pairs[:, 2] == number).any():
                    metrics[f"accuracy_{name}"] = [pair_metrics(pairs[pairs[:, 2] == number])["accuracy"].item()]
        return result

    def save_final(self) -> None:
        """Save what every trainer saves; with `calibrate_rewards`, mean and std of the rewards of the last evaluation
        in the model's config, under OpenRLHF's names; with `value_head_prefix`, the head by another name."""
        if self.args.calibrate_rewards:
            rewards, config = torch.cat(self.evaluated)[:, :2], self.accelerator.unwrap_model(self.model).config
            config.mean, config.std = rewards.mean().item(), max(rewards.std().item(), 1e-8)
        super().save_final()
        if self.args.value_head_prefix != "score" and self.is_world_process_zero():
            rename_head(Path(self.args.output_dir), self.args.value_head_prefix)


class DPOTrainer(PairPackingMixin, trl.DPOTrainer):
    """TRL's DPOTrainer (https://arxiv.org/abs/2305.18290) with the objectives that it lacks: cDPO, IPO on sums, and the
    negative log-likelihood of the chosen side; [`DPOObjective`] has their formulas."""

    args: DPOConfig
    objective: DPOObjective
    patched = False
    start: StartingWeights | None = None  # of an adapter that is trained further, which is its own reference

    def __init__(self, *, args: DPOConfig, record: Record, ref_model: PreTrainedModel | None = None, **kwargs: object):
        self.reference_passes = int(not args.precompute_ref_log_probs)
        settled = overridden(args, model_init_kwargs=None)
        with user_errors(), settled, offloaded_parameters(args), sharding_by_layer():
            super().__init__(args=args, ref_model=ref_model, record=record, **kwargs)
        if args.precompute_ref_log_probs and args.ref_model_name_or_path is None:
            self.ref_model = None
        self._patch_forwards()
        self.data_collator = LayoutCollator(self.data_collator, args.packing, self.shares_prefix)
        self.settle_objective()

    def settle_objective(self) -> None:
        """Give TRL's loss its part of the recipe's objective."""
        self.objective = DPOObjective.from_args(self.args)
        self.loss_types, self.loss_weights = self.objective.loss_types, self.objective.loss_weights
        self.label_smoothing = self.objective.label_smoothing

    @property
    def own_reference(self) -> torch.nn.Module:
        """Return the reference that is kept, or the model, whose adapter is off, or as it was, when it is one."""
        return self.model if self.ref_model is None else self.ref_model

    def _patch_forwards(self) -> None:
        """Patch both models, once TRL has put its fused head on them; its constructor may already run the reference."""
        if not self.patched:
            self.patched = True
            # PATCH(trl<1.17): TRL copies an adapter that is trained further for the reference, see StartingWeights.
            # Waits for trl/trainer/dpo_trainer.py:689. Delete when the copy is whole, frozen without dropout, and not
            # saved.
            if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")
                self.start = StartingWeights(self.model)
            for model in dict.fromkeys((self.model, self.own_reference)):
                with user_errors():
                    unwrapped = self.accelerator.unwrap_model(model)
                    if self.args.disable_dropout:
                        turn_off_dropout(unwrapped)
                    pack_causal_lm(unwrapped, self.args.packing, self.shares_prefix, self.context)

    def _precompute_ref_logps(self, *args: object) -> Dataset:
        # PATCH(trl<1.17): TRL caches reference log-probs by data set and weights only, although they also depend on
        # the configs of model and adapter and on `ld_alpha`. Waits for trl/trainer/dpo_trainer.py:1174. Delete when
        # they are hashed.
        self._patch_forwards()
        reference = self.accelerator.unwrap_model(self.own_reference)
        adapter = {} if self.start is None else reference.peft_config["default"].to_dict()
        configs = reference.config.to_json_string(), json.dumps(adapter, default=sorted)
        known_by = (self._precompute_model_hash, self.args.ld_alpha, *configs)
        with overridden(self, _precompute_model_hash=known_by):
            return super()._precompute_ref_logps(*args)  # type: ignore[arg-type]

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """Yield the reference model, moved to the device for its pass where `ref_offload` keeps it on the CPU."""
        # ZeRO-3 and fsdp2_offload bring it layer by layer themselves; fsdp2 moves each rank's shards
        sharding = launched_sharding(self.args)
        offloads_itself = sharding.is_zero3 or (sharding.engine == "fsdp" and sharding.offload_weights)
        if not self.args.ref_offload or offloads_itself or self.ref_model is None:
            settle_trained(self.model)
            yield self.own_reference
            return
        reference = self.accelerator.unwrap_model(self.ref_model).to(self.accelerator.device)
        yield self.ref_model
        reference.to("cpu")

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Return the reference's log-probabilities, with an adapter that is trained further as it was."""
        if self.start is None:
            return super().compute_ref_log_probs(model, inputs)
        with self.start.restored(), overridden(self, ref_model=model):  # or TRL would turn the adapter off
            return super().compute_ref_log_probs(model, inputs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> torch.Tensor | tuple[torch.Tensor, FusedCausalLMOutput | None]:
        """Return TRL's loss plus our terms, from a reference computed here and the policy's recorded outputs."""
        if not self.precompute_ref_logps:
            with self.reference() as reference:
                chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        policy: list[FusedCausalLMOutput] = []

        def recorded(*args: object, **kwargs: object) -> FusedCausalLMOutput:
            policy.append(model(*args, **kwargs))
            return policy[0]

        with overridden(self, precompute_ref_logps=True):
            result = super().compute_loss(recorded, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        log_probs = cast(torch.Tensor, policy[0].log_probs)
        added, metrics = self.objective.added_terms(log_probs, inputs, self.beta)
        self.record_pairs(log_probs.detach(), inputs)
        for name, value in metrics.items():
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(value).mean())
        return (loss + added, outputs) if return_outputs else loss + added

    def record_pairs(self, log_probs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Log accuracy and ties of the implicit rewards, beta times the log-ratio of policy and reference; TRL's
        `rewards/accuracies` counts a tie as lost, and all pairs tie before the first step."""
        sides = zip(log_probs.sum(dim=1).chunk(2), ("ref_chosen_logps", "ref_rejected_logps"), strict=True)
        self.rewards = self.beta * torch.stack([logps - inputs[name] for logps, name in sides], dim=1)
        pairs = self.accelerator.gather_for_metrics(self.rewards)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("accuracy", "ties"):
            metrics[name].append(pair_metrics(pairs)[name])
        if not self.model.training:
            self.evaluated.append(pairs.float().cpu())

    def evaluation_loop(self, *args: object, **kwargs: object) -> EvalLoopOutput:
        """Evaluate with every pair counted once in `accuracy` and `ties`; TRL averages its metrics over batches."""
        self.evaluated = []
        result = super().evaluation_loop(*args, **kwargs)  # type: ignore[arg-type]
        metrics = pair_metrics(torch.cat(self.evaluated))
        self._metrics["eval"] |= {name: [metrics[name].item()] for name in ("accuracy", "ties")}
        return result
