"""Several runs in one launch: `accelerate launch tests/runs.py '[["sft", {"learning_rate": 1e-3, ...}], ...]'`."""

import json
import sys

from accelerate import Accelerator, PartialState

from tunebook import run_script

Accelerator.end_training = lambda self: None  # would end the processes' group after the first run
for task, keys in json.loads(sys.argv[1]):
    run_script(task, keys)
PartialState().destroy_process_group()
