"""A run whose loss, gradients or weights stop being numbers ends there, and nothing of it is saved."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ..checkpoints import resume_point
from ..errors import RecipeError
from ..packing.context_parallel import TRLTrainer


class NotFiniteError(RecipeError):
    """Training has diverged. The same command would diverge again at the same step."""

    exit_code = 1


class FiniteMixin(TRLTrainer):
    """Mixin before a TRL trainer that ends training at a step whose loss or, other than with fp16, which scales
    gradients until they fit, whose gradients are not finite: before the optimizer uses them."""

    step_loss: torch.Tensor | float = 0.0  # of the micro-batches of a step, on this process

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[arg-type]
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def _get_grad_norm(self, *args: object, **kwargs: object) -> torch.Tensor | float | None:
        # PATCH(transformers<5.25): the Trainer puts the mean of earlier losses in the place of one that is not finite,
        # trains on, and shows no callback the norm. Waits for transformers/trainer.py:1920. Delete when it stops.
        norm = super()._get_grad_norm(*args, **kwargs)
        loss, self.step_loss = self.accelerator.reduce(self.step_loss, "sum"), 0.0
        numbers = {"loss": loss} if self.args.fp16 or norm is None else {"loss": loss, "gradient norm": norm}
        for name, number in numbers.items():
            if not torch.isfinite(torch.as_tensor(number)).all():
                self._end(f"Step {self.state.global_step + 1}: the {name} is {float(number)}.")
        return norm

    def check_weights(self) -> None:
        """Refuse to save weights that are not finite, on all processes at once.

        Raises:
            NotFiniteError: one is not.
        """
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        parts = ((name, p.to_local() if isinstance(p, DTensor) else vars(p).get("ds_tensor", p)) for name, p in trained)
        name = next((name for name, part in parts if not part.isfinite().all()), None)
        if self.accelerator.reduce(torch.tensor(float(name is not None), device=self.args.device), "sum"):
            self._end(f"Step {self.state.global_step}: the weights are not finite ({name or 'of another process'}).")

    def _end(self, what: str) -> None:
        raise NotFiniteError(
            f"{what} Nothing of it is saved. {resume_point(Path(self.args.output_dir))} First set a lower "
            "learning_rate, or look at the rows of that step."
        )
