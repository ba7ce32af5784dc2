"""FSDP2 with the numbers of DDP: what accelerate, transformers and TRL settle otherwise."""

from dataclasses import replace

import torch

from ..packing.context_parallel import TRLTrainer


class FSDPMixin(TRLTrainer):
    """Mixin before a TRL trainer: under FSDP2, what the model returns and the sums of gradients stay in float32."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.accelerator.is_fsdp2:
            return
        plugin = self.accelerator.state.fsdp_plugin
        # PATCH(accelerate<1.16): in bf16 it has FSDP2 cast whatever the model returns, log-probs and losses too, and
        # the gradients while they are summed. Waits for accelerate/utils/dataclasses.py:2141. Delete when its config
        # can set the dtypes of outputs and of the reduction.
        if (policy := plugin.mixed_precision_policy) is not None:
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
