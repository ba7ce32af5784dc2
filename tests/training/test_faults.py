"""Damaged checkpoints, two runs in one folder, signals: what a run resumes from, and what it says."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_weights, copy_until, logged, options, short_recipe, train
from filelock import SoftFileLease

from tunebook import checkpoints
from tunebook.checkpoints import MANIFEST, find_checkpoint
from tunebook.environment import free_build_locks
from tunebook.errors import RecipeError, interrupted_by_signals
from tunebook.following.report import read_json
from tunebook.training import held, holding

SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}


@pytest.fixture(scope="module")
def run(tiny, sft_rows, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of 6 steps, saved every 2 and logged every 3."""
    train("sft", tiny, sft_rows, folder := tmp_path_factory.mktemp("runs") / "whole", **SAVED)
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "o")


def flip(path: Path, place: float) -> None:
    """Flips a bit of one byte."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "other type": lambda path: replace(path, b"[]"),
    "deleted": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def checkpoint_files() -> list[str]:
    """What a checkpoint of the tiny model holds."""
    names = ["config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"]
    names += ["scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin"]
    return [*names, "README.md", "chat_template.jinja", MANIFEST]


def test_the_list_of_files_is_a_checkpoint_s(run):
    assert {path.name for path in (run / "checkpoint-6").iterdir()} == set(checkpoint_files())


@pytest.mark.parametrize("name", checkpoint_files())
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(name, copied, run, caplog):
    for damage, apply in DAMAGES.items():
        caplog.clear()
        apply(copied / "checkpoint-6" / name)
        assert find_checkpoint(copied, "auto") == copied / "checkpoint-4", damage
        [line] = [record.getMessage() for record in caplog.records]
        assert "checkpoint-6 is ignored" in line and (name in line or MANIFEST in line), damage
        with pytest.raises(RecipeError, match="not a complete checkpoint"):
            find_checkpoint(copied, str(copied / "checkpoint-6"))
        shutil.rmtree(copied / "checkpoint-6")
        shutil.copytree(run / "checkpoint-6", copied / "checkpoint-6")
    assert find_checkpoint(copied, "auto") == copied / "checkpoint-6"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_never_starts_anew_by_itself(copied, tiny, sft_rows):
    for folder in copied.glob("checkpoint-*"):
        flip(folder / "model.safetensors", 0.7)
    with pytest.raises(RecipeError, match="checkpoint-6: it is damaged: model.safetensors(.|\n)*: never"):
        train("sft", tiny, sft_rows, copied, **SAVED)
    train("sft", tiny, sft_rows, copied, **SAVED | {"max_steps": 2}, resume_from_checkpoint="never")
    assert find_checkpoint(copied, "auto") == copied / "checkpoint-2"


def test_what_is_called_a_checkpoint_and_is_none_stops_nothing(copied, tmp_path):
    (copied / "checkpoint-12").write_text("a file")
    (copied / "checkpoint-13").symlink_to("nowhere")
    shutil.move(copied / "checkpoint-2", tmp_path / "elsewhere")
    (copied / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert find_checkpoint(copied, "auto") == copied / "checkpoint-6"
    checkpoints.rotate(copied, limit=1, max_gb=None, best=None)
    assert {path.name for path in copied.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12", "checkpoint-13"}
    assert (tmp_path / "elsewhere" / MANIFEST).exists()


def test_tokens_and_loss_of_a_resumed_run_are_those_of_the_whole_run(run, tiny, sft_rows, tmp_path):
    copy_until(4, run, tmp_path / "parts")
    (tmp_path / "parts" / "all_results.json").write_text("")
    resumed = train("sft", tiny, sft_rows, tmp_path / "parts", **SAVED)
    whole, parts = (read_json(folder / "train_results.json") for folder in (run, tmp_path / "parts"))
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    state = read_json(run / "checkpoint-6" / "trainer_state.json")
    tokens = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry]
    assert logged(resumed, "num_tokens") == tokens and read_json(tmp_path / "parts" / "all_results.json")


# ---- One run per folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(holding, "SILENCE", 1.0)
    monkeypatch.setattr(holding, "REFRESH", 0.2)


def foreign_lock(folder: Path, host: str, pid: int) -> Path:
    """The lock of another process, as it would have written it."""
    fields = {"pid": pid, "host": host, "mode": "lease", "token": "other", "duration": holding.SILENCE}
    (folder / holding.LOCK).write_text("filelock/2\n" + "".join(f"{k}={v}\n" for k, v in fields.items()))
    return folder / holding.LOCK


def test_the_folder_of_a_live_process_is_refused_with_its_host_its_pid_and_how_to_free_it(tmp_path, impatient):
    with held(tmp_path):
        pattern = rf"in use by process {os.getpid()} on .*remove {tmp_path / '.lock'}"
        with pytest.raises(RecipeError, match=pattern), held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_host_that_does_not_refresh_it_is_taken_with_one_line(tmp_path, impatient, caplog):
    foreign_lock(tmp_path, "node7", 123)
    with held(tmp_path):
        assert SoftFileLease(tmp_path / ".lock", lease_duration=1.0).owner.pid == os.getpid()
    assert "Process 123 on node7 did not end" in caplog.records[-1].getMessage()


def test_the_lock_of_a_dead_process_on_this_host_is_taken_at_once(tmp_path, caplog):
    with held(tmp_path):
        lock = (tmp_path / ".lock").read_text()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lines = [line for line in lock.splitlines() if not line.startswith("start=")]
    (tmp_path / ".lock").write_text("\n".join(lines).replace(f"pid={os.getpid()}", f"pid={child.pid}") + "\n")
    start = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - start < 5
    assert f"Process {child.pid} on" in caplog.text


def test_a_run_whose_lock_was_taken_while_it_was_silent_ends(tmp_path, impatient):
    raises = pytest.raises(RecipeError, match="was taken by another run")
    with raises, interrupted_by_signals(), held(tmp_path):
        (tmp_path / ".lock").unlink()
        foreign_lock(tmp_path, "node7", 123)
        time.sleep(20)


# ---- Signals --------------------------------------------------------------------------------------------------------


SLOW = """
import time
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(1)
"""


def start(tiny, rows, folder, log, **keys) -> subprocess.Popen:
    """A run in a process of its own, of slow steps."""
    (log.parent / "slow.py").write_text(SLOW)
    keys = {"max_steps": 80, "callbacks": "slow:Slow", **keys}
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{log.parent}"}
    command = [sys.executable, "src/sft.py", *options(short_recipe(tiny, rows, folder, **keys))]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=log.open("wb"))


def wait_until(process, condition) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture(scope="module")
def ended(tiny, sft_rows, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, log and output_dir of a run that got SIGTERM, of one that was started beside it in its folder, and of
    one that got Ctrl-C."""
    runs = {name: tmp_path_factory.mktemp("runs") for name in ("SIGTERM", "beside", "SIGINT")}
    folders = {name: runs["SIGTERM" if name == "beside" else name] / "o" for name in runs}
    log = {name: folder / "log" for name, folder in runs.items()}
    processes = {name: start(tiny, sft_rows, folders[name], log[name]) for name in ("SIGTERM", "SIGINT")}
    wait_until(processes["SIGTERM"], (folders["SIGTERM"] / ".lock").exists)
    processes["beside"] = start(tiny, sft_rows, folders["beside"], log["beside"])
    for name in ("SIGTERM", "SIGINT"):
        wait_until(processes[name], lambda name=name: b"step 5/" in log[name].read_bytes())
        if name == "SIGTERM":
            processes["beside"].wait()
        processes[name].send_signal(signal.Signals[name])
    return {name: (processes[name].wait(), log[name].read_text(), folders[name]) for name in runs}


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_in_one_message(ended):
    code, said, folder = ended["beside"]
    assert code == 2 and re.fullmatch(rf"error: {folder} is in use by process \d+ on .*\n", said)


@pytest.mark.slow
def test_sigterm_saves_after_the_step_in_hand_and_the_next_start_goes_on_from_there(ended, tiny, sft_rows, tmp_path):
    code, said, folder = ended["SIGTERM"]
    [checkpoint] = folder.glob("checkpoint-*")
    whole = f"{checkpoint.name} is whole. The same command resumes from {checkpoint.name}."
    assert code == 143 and said.endswith(f"Ended by SIGTERM. {whole}\n") and "Traceback" not in said
    for output_dir in (folder, tmp_path):
        assert train("sft", tiny, sft_rows, output_dir, max_steps=80).state.global_step == 80
    assert_same_weights(folder, tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_at_once_in_one_line(ended):
    code, said, folder = ended["SIGINT"]
    assert code == 130 and "Traceback" not in said and not (folder / ".lock").exists()
    assert said.endswith("Interrupted. There is no checkpoint. The same command resumes from the start.\n")


def test_ctrl_c_while_the_libraries_load_is_one_line(tiny, sft_rows, tmp_path):
    process = start(tiny, sft_rows, tmp_path / "o", log := tmp_path / "log")
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert (process.wait(), log.read_text()) == (130, "Interrupted.\n")


@pytest.mark.parametrize("held", [False, True])
def test_the_lock_of_a_build_that_was_killed_is_removed_once_nothing_is_built(held, tmp_path, monkeypatch, caplog):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("tunebook.environment.BUILD_SILENCE", 1.5)
    with lock.open("w") as file:
        if not held:
            file.close()
        began = time.monotonic()
        free_build_locks()
    assert lock.exists() == held == (time.monotonic() - began < 1.5)
    assert held or str(lock) in caplog.text
