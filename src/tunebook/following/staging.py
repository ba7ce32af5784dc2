"""Models that are staged: copies of checkpoints that no rotation can touch, to be pushed or benchmarked.

What a checkpoint still owes is read from what is on disk, at each start, at each save and at the end of a run. So a
process that is killed between a save and its push, or that finds the disk full, leaves nothing behind for good.
"""

import logging
import os
import shutil
from abc import abstractmethod
from pathlib import Path

from transformers import TrainerCallback, TrainerState

from ..checkpoints import checksum, list_checkpoints, optional, read_manifest, step_of
from ..errors import RecipeError
from ..files import whole_folder
from ..recipe.configs import RunConfig

logger = logging.getLogger(__name__)

# The files that may be pushed. A list of those that may not could not be complete: checkpoints also hold optimizer
# states, training_args.bin (with hub_token), the recipe, and whatever a callback writes.
MODEL_FILES = [
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "additional_chat_templates/*.jinja", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
]


def model_checksums(source: Path) -> dict[str, str]:
    """Return name -> checksum of the model files of a folder: those of its manifest, computed where it has none."""
    names = {str(path.relative_to(source)) for pattern in MODEL_FILES for path in source.glob(pattern)}
    manifest = read_manifest(source)
    known = manifest["checksums"] if manifest else {}
    return {name: known.get(name) or checksum(source / name) for name in sorted(names)}


def stage_model(source: Path, target: Path) -> None:
    """Put the model files of a checkpoint into a new folder that no rotation of checkpoints can touch.

    Weights are hard links, which cost no space and survive the deletion of the checkpoint, or copies where the file
    system has no links. `target` appears complete or not at all.

    Raises:
        RecipeError: there are no weights in `source`.
    """
    if not any(source.glob("*.safetensors")):
        raise RecipeError(
            f"{source} holds no *.safetensors. To push or benchmark checkpoints, set `fsdp_state_dict_type: "
            "FULL_STATE_DICT` under FSDP, and `zero3_save_16bit_model: true` under ZeRO-3."
        )
    with whole_folder(target) as folder:
        for path in {path for pattern in MODEL_FILES for path in source.glob(pattern)}:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                # A link shares its bytes with the checkpoint, in which the other files may be edited in place
                (os.link if path.suffix == ".safetensors" else shutil.copyfile)(path, copy)
            except OSError:
                shutil.copyfile(path, copy)


class StagingCallback(TrainerCallback):
    """Stages each checkpoint that owes something: at a save, and those that an earlier process of the run left.

    Attributes:
        owing: checkpoints that could not be staged, since the disk is full. No rotation may delete them.
    """

    owing: set[Path] = set()

    @abstractmethod
    def owes(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is still to be staged."""

    @abstractmethod
    def stage(self, checkpoint: Path) -> None: ...

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: object, **kwargs: object) -> None:  # type: ignore[override]
        self.settle(Path(args.output_dir), state)

    def on_save(self, args: RunConfig, state: TrainerState, control: object, **kwargs: object) -> None:  # type: ignore[override]
        self.settle(Path(args.output_dir), state)

    def settle(self, output_dir: Path, state: TrainerState) -> None:
        """Stage what is owed up to the current step. On a full disk, warn; it is tried again at the next call."""
        if not state.is_world_process_zero:
            return
        saved = {*list_checkpoints(output_dir), output_dir / f"checkpoint-{state.global_step}"}
        due = [path for path in saved if path.exists() and step_of(path) <= state.global_step and self.owes(path)]
        self.owing = set(due)
        for checkpoint in sorted(due, key=step_of):
            with optional(f"a copy of {checkpoint.name}"):
                self.stage(checkpoint)
                self.owing.discard(checkpoint)
