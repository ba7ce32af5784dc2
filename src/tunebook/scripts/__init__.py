"""The scripts sft, rm and dpo as modules, to import or for `accelerate launch -m tunebook.scripts.sft`.

The wheel carries them here; in a checkout they stay in src/, where one reads and launches them.
"""

from pathlib import Path

if not Path(__file__).with_name("sft.py").exists():
    __path__.append(str(Path(__file__).parents[2]))
