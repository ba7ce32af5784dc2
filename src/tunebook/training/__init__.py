"""The life of a run: prepare, the model, TRL's trainers, fit.

In: a recipe. Out: a trained model in output_dir. Imports following and what is above it.
"""

from .holding import held
from .models import load_model, load_reference
from .run import fit, prepare
from .trainers import DPOTrainer, RewardTrainer, SFTTrainer

__all__ = ["DPOTrainer", "RewardTrainer", "SFTTrainer", "fit", "held", "load_model", "load_reference", "prepare"]
