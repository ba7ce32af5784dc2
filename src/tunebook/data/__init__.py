"""Rows become tokens and labels, once.

In: a [`Recipe`]. Out: the tokenizer, and [`Data`] in TRL's processed columns. Imports recipe and what is above it.
"""

from .loading import Data, load_data, load_recipe_data, read_sources
from .tokenizer import load_recipe_tokenizer, settle_template

__all__ = ["Data", "load_data", "load_recipe_data", "load_recipe_tokenizer", "read_sources", "settle_template"]
