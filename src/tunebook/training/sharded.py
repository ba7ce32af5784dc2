"""FSDP2 with the numbers of DDP, and DPO's reference under ZeRO-3: what accelerate, transformers and TRL settle
otherwise."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.models.utils import prepare_fsdp
from trl.trainer import dpo_trainer

from ..environment import launched_sharding, uses_fsdp
from ..packing.context_parallel import TRLTrainer
from ..packing.forward import without_adapter
from ..recipe.configs import DPOConfig


def shard_reference(model: torch.nn.Module, accelerator: Accelerator) -> FullyShardedDataParallel | FSDPModule:
    """Shard DPO's reference layer by layer, as the policy is; return it in evaluation mode."""
    if accelerator.is_fsdp2:
        model = fsdp2_prepare_model(accelerator, model.requires_grad_(False))  # which it would cast to float32
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_forward(True)  # also of the head, which no backward would free
    return prepare_fsdp(model, accelerator)


def sharding_by_layer() -> AbstractContextManager[object]:
    """Return a context in which TRL's DPOTrainer shards its reference with [`shard_reference`]."""
    # PATCH(trl<1.17): TRL makes one unit of the reference, which is gathered as a whole. Waits for
    # trl/models/utils.py:331. Delete when TRL shards it as accelerate does the policy.
    return patch.object(dpo_trainer, "prepare_fsdp", shard_reference)


@contextmanager
def offloaded_parameters(args: DPOConfig) -> Iterator[None]:
    """Let the engine that TRL makes for the reference under ZeRO-3 keep its parameters on the CPU (`ref_offload`)."""
    # PATCH(trl<1.17): the engine copies the run's DeepSpeed config, and no argument changes the copy. Waits for
    # trl/models/utils.py:255. Delete when prepare_deepspeed takes a config.
    if not (args.ref_offload and launched_sharding(args).is_zero3):
        yield
        return
    plugin = args.deepspeed_plugin
    assert plugin is not None
    before = plugin.deepspeed_config["zero_optimization"].get("offload_param", {"device": "none"})
    plugin.deepspeed_config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    try:
        yield
    finally:  # in the copy that transformers has put in its place, which the policy's engine is made from
        plugin.deepspeed_config["zero_optimization"]["offload_param"] = before


def settle_trained(model: torch.nn.Module) -> None:
    """Let FSDP2 note now which parameters are trained, before a forward with the adapter off."""
    # PATCH(torch<2.14): it notes them, and the dtype of their gradients, in the first forward. Waits for
    # torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:273. Delete when it reads requires_grad in each backward.
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


class FSDPMixin(TRLTrainer):
    """Mixin before a TRL trainer: under FSDP2, what the model returns and the sums of gradients stay in float32,
    gradients stay sharded between micro-batches, and a tied weight is saved once."""

    def create_accelerator_and_postprocess(self) -> None:
        # PATCH(transformers<5.25): between the micro-batches of a step, the Trainer keeps gradients whole on each
        # device, as it does under DDP. Waits for transformers/trainer.py:1915. Delete when it shards them.
        if uses_fsdp():
            config = self.args.accelerator_config
            assert isinstance(config, AcceleratorConfig)
            given = config.gradient_accumulation_kwargs or {}
            config.gradient_accumulation_kwargs = {"sync_each_batch": True, **given}
        super().create_accelerator_and_postprocess()
        if not self.accelerator.is_fsdp2:
            return
        plugin = self.accelerator.state.fsdp_plugin
        # PATCH(accelerate<1.16): in bf16 it has FSDP2 cast whatever the model returns, log-probs and losses too, and
        # the gradients while they are summed. Waits for accelerate/utils/dataclasses.py:2141. Delete when its config
        # can set the dtypes of outputs and of the reduction.
        if (policy := plugin.mixed_precision_policy) is not None:
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # PATCH(transformers<5.25): what FSDP gathers holds a tied weight by each of its names, no longer as one
        # tensor, and the Trainer saves all. Waits for transformers/trainer.py:4107. Delete when it saves one.
        if state_dict is not None and self.is_fsdp_enabled:
            tied = without_adapter(self.accelerator.unwrap_model(self.model)).all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
