"""A small, fixed part of the campaign: `make campaign` tries all of it."""

import subprocess
import sys

import pytest
from conftest import ROOT

PARTS = ("operations", "hub_faults", "damages", "recipes", "data_files")


@pytest.mark.slow
def test_a_part_of_the_campaign_loses_nothing_and_hides_nothing():
    parts = [word for part in PARTS for word in ("--part", part)]
    command = [sys.executable, str(ROOT / "tests" / "campaign" / "campaign.py"), "--share", "0.02", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert all(f"| {part} |" in done.stdout for part in PARTS)
