"""A disk that fills in the middle of a save, made of a small tmpfs."""

import subprocess
from pathlib import Path

import pytest
from conftest import assert_same_weights, launch, options, short_recipe, train

from tunebook.checkpoints import MANIFEST, DiskFullError

pytestmark = pytest.mark.slow
PAGE = 4096
KEYS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def pages(folder) -> int:
    """Bytes that the files of a folder take on a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def whole_checkpoints(folder) -> set[str]:
    return {path.parent.name for path in folder.glob(f"checkpoint-*/{MANIFEST}")}


@pytest.fixture(scope="module")
def uninterrupted(tiny, sft_rows, tmp_path_factory):
    """Output folder of a run with all the room it wants."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train("sft", tiny, sft_rows, folder, **KEYS)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """Makes tmp_path / "disk" a file system of `size` bytes."""
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


# The disk has room for some of the second checkpoint's weights, or for its weights and some of the optimizer's states
@pytest.mark.parametrize("share, said", [(0.15, "os error 28"), (0.6, "inline_container")])
def test_a_full_disk_leaves_the_checkpoint_before_whole_and_with_room_the_run_resumes(
    share, said, small_disk, uninterrupted, tiny, sft_rows
):
    size = pages(uninterrupted / "checkpoint-2")
    folder = small_disk(int(size * (1 + share)) + 8 * PAGE)
    run = ("sft", tiny, sft_rows, folder)
    with pytest.raises(DiskFullError, match="checkpoint-4 could not be saved(.|\n)*checkpoint-2 is whole") as raised:
        train(*run, **KEYS)
    assert said in str(raised.value)
    assert whole_checkpoints(folder) == {"checkpoint-2"}

    small_disk(10 * size, "remount")
    train(*run, **KEYS)
    assert whole_checkpoints(folder) == {"checkpoint-2", "checkpoint-4"}
    assert_same_weights(folder, uninterrupted)


def test_a_model_that_cannot_be_saved_gives_one_message_and_is_saved_by_the_same_command(
    small_disk, uninterrupted, tiny, sft_rows
):
    size = pages(uninterrupted / "checkpoint-4")
    folder = small_disk(int(size * 1.15) + 8 * PAGE)
    keys = KEYS | {"save_steps": 4}
    done = launch("src/sft.py", *options(short_recipe(tiny, sft_rows, folder, **keys)))
    ours = done.stderr.partition("error: The model could not be saved")[2]
    assert done.returncode == 1 and "checkpoint-4 is whole" in ours and not (folder / "model.safetensors").exists()
    assert "Traceback" not in done.stderr.partition("error: ")[0]

    small_disk(10 * size, "remount")
    train("sft", tiny, sft_rows, folder, **keys)
    assert_same_weights(folder, uninterrupted)
