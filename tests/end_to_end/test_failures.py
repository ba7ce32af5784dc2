"""A disk that fills in the middle of a save, made of a small tmpfs."""

import subprocess
from pathlib import Path

import pytest
from conftest import assert_same_weights, launch, options

from tunebook.checkpoints import MANIFEST, DiskFullError
from tunebook.recipe import parse
from tunebook.scripts import sft

pytestmark = pytest.mark.slow
PAGE = 4096


def recipe(tiny, rows, output_dir) -> dict:
    return {
        "model_name_or_path": str(tiny),
        "dataset_name": str(rows),
        "output_dir": str(output_dir),
        "bf16": False,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "disable_tqdm": True,
    }


def pages(folder) -> int:
    """Bytes that the files of a folder take on a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def whole_checkpoints(folder) -> set[str]:
    return {path.parent.name for path in folder.glob(f"checkpoint-*/{MANIFEST}")}


@pytest.fixture(scope="module")
def uninterrupted(tiny, sft_rows, tmp_path_factory):
    """Output folder of a run with all the room it wants."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    sft.main(parse("sft", recipe(tiny, sft_rows, folder)))
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """Makes tmp_path / "disk" a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.strip()}")
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


# Of the second checkpoint: room for some of the weights, and for the weights and some of the optimizer's states
@pytest.mark.parametrize("share, said", [(0.15, "os error 28"), (0.6, "inline_container")])
def test_a_full_disk_leaves_the_checkpoint_before_whole_and_with_room_the_run_goes_on(
    share, said, small_disk, uninterrupted, tiny, sft_rows
):
    size = pages(uninterrupted / "checkpoint-2")
    folder = small_disk(int(size * (1 + share)) + 8 * PAGE)
    keys = recipe(tiny, sft_rows, folder)
    with pytest.raises(DiskFullError, match="checkpoint-4 could not be saved(.|\n)*checkpoint-2 is whole") as raised:
        sft.main(parse("sft", keys))
    assert said in str(raised.value)
    assert whole_checkpoints(folder) == {"checkpoint-2"}

    small_disk(10 * size, "remount")
    sft.main(parse("sft", keys))
    assert whole_checkpoints(folder) == {"checkpoint-2", "checkpoint-4"}
    assert_same_weights(folder, uninterrupted)


def test_a_model_that_cannot_be_saved_is_said_in_one_message_and_saved_by_the_same_command(
    small_disk, uninterrupted, tiny, sft_rows
):
    size = pages(uninterrupted / "checkpoint-4")
    folder = small_disk(int(size * 1.15) + 8 * PAGE)
    keys = {**recipe(tiny, sft_rows, folder), "save_steps": 4}
    done = launch("src/sft.py", *options(keys))
    ours = done.stderr.partition("error: The model could not be saved")[2]
    assert done.returncode == 1 and "checkpoint-4 is whole" in ours and not (folder / "model.safetensors").exists()
    assert "Traceback" not in done.stderr.partition("error: ")[0]

    small_disk(10 * size, "remount")
    sft.main(parse("sft", keys))
    assert_same_weights(folder, uninterrupted)
