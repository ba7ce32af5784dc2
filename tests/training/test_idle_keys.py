"""A key that is set to another value than its default changes a run, or is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import train

from tunebook.errors import RecipeError
from tunebook.recipe import schema
from tunebook.recipe.keys import old_keys

KEYS = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "test_split_size": 8, "save_strategy": "steps"}
KEYS |= {"save_steps": 2, "per_device_train_batch_size": 3}
# What this run, on one process without a GPU and with these rows, cannot show
UNSEEN = {
    "the launch": "average_tokens_across_devices ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph "
    "ddp_timeout ddp_bucket_cap_mb save_on_each_node log_on_each_node full_determinism",
    "a GPU": "dataloader_pin_memory auto_find_batch_size fp32_loss ref_offload",
    "a resume": "ignore_data_skip force_resume",
    "the rows and the model": "completion_only_loss assistant_only_loss max_length trust_remote_code disable_dropout",
    "redundant": "do_eval disable_tqdm logging_first_step load_best_model_at_end eval_delay per_device_eval_batch_size "
    "save_steps precompute_ref_log_probs",
}
SET_HERE = {"output_dir", "max_steps", "dry_run", "tf32", "torch_compile", "push_to_hub", "bf16", "use_cpu"}


def other_value(key: str, task: str) -> object:
    """A plain value other than the default; None where the key takes text or a structure."""
    field, hint = schema.task_keys(task)[key]
    value = schema.default(field)
    if "bool" in str(hint):
        return not value if isinstance(value, bool) else True
    if isinstance(value, int):
        return value + 1 if value >= 0 else 2
    return value + 0.5 if isinstance(value, float) and value < 0.5 else value / 2 if isinstance(value, float) else None


def observe(task: str, model: Path, rows: Path, out: Path, **changes) -> str:
    """All that a run leaves: its log without times, files, weights, optimizer, callbacks and loader."""
    shutil.rmtree(out, ignore_errors=True)
    trainer = train(task, model, rows, out, **KEYS | changes)
    timed = ("runtime", "per_second", "flos")
    log = [
        {name: value for name, value in entry.items() if not any(word in name for word in timed)}
        for entry in trainer.state.log_history
    ]
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    weights = hashlib.md5(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
    groups = [{k: str(v) for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    callbacks = sorted(type(callback).__name__ for callback in trainer.callback_handler.callbacks)
    loader, model = trainer.get_train_dataloader(), trainer.model
    rest = [
        sorted(path.read_text() for path in out.glob("*config.json")),
        loader.num_workers,
        model.is_gradient_checkpointing,
        str(model.dtype),
    ]
    return json.dumps([log, files, weights, groups, callbacks, rest], default=str)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_plain_key_changes_a_run_or_is_refused(task, tiny, task_rows, tmp_path):
    others = set() if task == "sft" else schema.task_keys("sft").keys()  # tried there
    unchanged, unseen = observe(task, tiny, task_rows, tmp_path / "o"), " ".join(UNSEEN.values()).split()
    idle = set()
    for key in schema.task_keys(task).keys() - old_keys().keys() - SET_HERE - others - set(unseen):
        value = other_value(key, task)
        try:
            if value is not None and observe(task, tiny, task_rows, tmp_path / "o", **{key: value}) == unchanged:
                idle.add(key)
        except RecipeError:
            continue
    assert not idle
