"""One command: every checkpoint on its own revision, benchmarked, with generations beside it; Hub slow, then down."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, launch, options, short_recipe
from hub_server import HubServer

from tunebook.files import read_rows

pytestmark = pytest.mark.slow
KEYS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
KEYS |= {"callbacks": ["push_to_hub_revision"], "hub_model_id": "me/notes", "hub_revision": "v1"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 8, "benchmarks": ["arithmetic_choice"]}
EVALUATED |= {"eval_prompts": ["what is 2 plus 3?", "what is 1 plus 1?"], "eval_metrics": ["generation_metrics:length"]}
EVALUATED |= {"eval_generation_kwargs": {"max_new_tokens": 4}}
REVISIONS = [f"v1-step-{step:09d}" for step in (2, 4, 6)] + ["v1"]


def environment(endpoint: str, folder) -> dict[str, str]:
    """huggingface_hub reads these when it is imported."""
    (folder / "generation_metrics.py").write_text(
        "def length(samples, prompts, outputs):\n    return {'length': [len(o) for o in outputs]}\n"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **settings, "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(folder)}


def test_a_slow_hub_gets_three_revisions_with_scores_and_generations(tiny, sft_rows, tmp_path):
    keys = short_recipe(tiny, sft_rows, tmp_path / "o", **KEYS, **EVALUATED)
    with HubServer() as hub:
        hub.delay("/preupload/", 0.4)
        env = environment(hub.url, tmp_path)
        done = launch("src/sft.py", *options(keys), env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        load = (
            "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
            "for r in sys.argv[1:]: [c.from_pretrained('me/notes', revision=r) for c in (M, T)]"
        )
        subprocess.run([sys.executable, "-c", load, *REVISIONS], env=env, check=True, timeout=120)
    assert [path.name for path in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-6"]
    rows = read_rows(tmp_path / "o" / "benchmarks.jsonl")
    assert [(row["step"], row["status"]) for row in rows] == [(step, "completed") for step in (2, 4, 6)]
    assert {row["step"] for row in read_rows(tmp_path / "o" / "generations.jsonl")} == {2, 4, 6}
    card = (tmp_path / "o" / "README.md").read_text()
    assert "## Benchmarks" in card and "model-index" in card and "## Recipe" in card


def test_a_hub_that_is_down_stops_nothing_and_the_run_says_what_to_push(tiny, sft_rows, tmp_path):
    with HubServer() as hub:
        url = hub.url
    env = environment(url, tmp_path)
    done = launch("src/sft.py", *options(short_recipe(tiny, sft_rows, tmp_path / "o", **KEYS)), env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "v1-step-000000002" in done.stderr and f"tunebook push {tmp_path / 'o'}" in done.stderr
    with HubServer() as hub:
        env["HF_ENDPOINT"] = hub.url
        push = [sys.executable, "-c", "from tunebook.tools.cli import app; app()", "push", str(tmp_path / "o")]
        env["PYTHONPATH"] = str(ROOT / "src")
        subprocess.run(push, env=env, check=True, timeout=120)
        assert set(REVISIONS) <= set(hub.repos["me/notes"].branches)
