"""The comparison of perf/: its arithmetic on made-up numbers, and one case at toy size in real processes."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, build_model

sys.path.insert(0, str(ROOT / "perf"))

import compare  # noqa: E402
import rows  # noqa: E402
from compare import TRL, TRL_NO_CHECKPOINTING, TUNEBOOK  # noqa: E402
