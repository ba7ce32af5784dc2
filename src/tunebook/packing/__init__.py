"""Packed training: documents in one row without padding, prefixes shared, rows shared by several processes.

In: a model and TRL's padded batches. Out: the model's forward, patched; batches of even tokens. Imports recipe
and what is above it.
"""

from .forward import pack_causal_lm, pack_reward_model

__all__ = ["pack_causal_lm", "pack_reward_model"]
