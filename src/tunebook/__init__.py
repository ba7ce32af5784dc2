"""tunebook: recipes for supervised fine-tuning, reward models and DPO on TRL."""

__version__ = "0.1.0"
