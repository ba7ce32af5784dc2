"""Checkpoints: which one is complete, what it was made from, and which one to resume from.

A checkpoint is complete when its manifest.json is there and every file has the size that is written in it. The manifest
is written last, and older checkpoints are deleted only after that: however a run ends, the newest one is whole.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import RecipeError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEGUN = f"{MANIFEST}.partial"  # in a checkpoint that is being saved, or whose save was interrupted
FIXED = ("model", "data", "seed", "max_tokens_per_batch")  # a run with a different one is a different run
# How Python, safetensors and torch.save, which loses the error's number, report a full disk or quota
FULL = re.compile(rf"(Errno|os error) ({errno.ENOSPC}|{errno.EDQUOT})\b|inline_container\.cc")


class DiskFullError(RecipeError):
    """A save found no room. The recipe is not at fault, but no traceback helps either."""

    exit_code = 1


@contextmanager
def saving(what: str, output_dir: Path) -> Iterator[None]:
    """Explain a disk that fills in the middle of a save.

    Raises:
        DiskFullError: names what could not be saved, and what the same command resumes from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        message = str(error).partition("\n")[0]
        if not FULL.search(message):
            raise
        free = shutil.disk_usage(output_dir).free
        whole = list_checkpoints(output_dir)
        raise DiskFullError(
            f"{what} could not be saved, {free / 1e6:.1f} MB are free for {output_dir}: {message}\n"
            + (f"{whole[-1].name} is whole. " if whole else "There is no checkpoint before it. ")
            + f"Make room; the same command resumes from {whole[-1].name if whole else 'the start'}."
        ) from error


def begin(folder: Path) -> None:
    """Mark a checkpoint as ours and incomplete before it is written, whatever its folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).touch()
    (folder / MANIFEST).unlink(missing_ok=True)


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete.

    Args:
        record: what it was made from, and how far training has come.
    """
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in (MANIFEST, BEGUN):
        files.pop(name, None)
    with open(folder / BEGUN, "w", encoding="utf-8") as file:
        json.dump({**record, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    (folder / BEGUN).replace(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete checkpoint; None for an incomplete one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest if whole else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, the least trained first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    manifests = {path: read_manifest(path) for path in found}
    return sorted((p for p, m in manifests.items() if m), key=lambda p: manifests[p]["consumed_samples"])


def find_checkpoint(output_dir: Path, wish: str) -> Path | None:
    """Return the checkpoint to resume from: the last complete one (auto), none (never), or a given one.

    Raises:
        RecipeError: when the given one does not exist or is incomplete.
    """
    if wish == "never":
        return None
    if wish != "auto":
        if read_manifest(Path(wish)) is None:
            raise RecipeError(
                f"`resume_from_checkpoint` {wish} is not a complete checkpoint of tunebook (it has no {MANIFEST}). Set "
                "it to one, or to auto."
            )
        return Path(wish)
    complete = list_checkpoints(output_dir)
    for path in set(output_dir.glob("checkpoint-*")) - set(complete):
        logger.warning("%s is ignored: its save was interrupted, or it is not a checkpoint of tunebook.", path)
    return complete[-1] if complete else None


def set_aside(output_dir: Path, names: Sequence[str]) -> None:
    """Move an earlier run's checkpoints, and the files of `names`, to a folder of their own.

    A run that starts anew must not resume from them, rotate them or report their scores as its own.
    """
    left = [*list_checkpoints(output_dir), *filter(Path.exists, (output_dir / name for name in names))]
    if left:
        folder = output_dir / f"before-{datetime.now():%Y%m%d-%H%M%S}"
        folder.mkdir()
        for path in left:
            path.rename(folder / path.name)
        logger.warning("Moved what an earlier run left in %s to %s.", output_dir, folder.name)


def check_resume(checkpoint: Path, record: Mapping[str, Any], force: bool, deepspeed: bool = False) -> None:
    """Log what changed since the checkpoint was made; refuse to resume if the model, the data or the seed differs.

    Raises:
        RecipeError: for such a difference, or a missing optimizer state, without which transformers 5.24 would resume
            silently; never when `force` is set.
    """
    before = read_manifest(checkpoint)
    assert before is not None
    state = "global_step" if deepspeed else "optimizer"
    if not force and not any(name.startswith(state) for name in before["files"]):
        raise RecipeError(
            f"{checkpoint} has no optimizer state for this launch: it was saved with save_only_model, or "
            f"{'without' if deepspeed else 'under'} DeepSpeed. Set `resume_from_checkpoint: never`, or `force_resume: "
            "true` to resume with a new optimizer."
        )
    changed = [f"{name}: {before[name]} -> {record[name]}" for name in FIXED if before[name] != record[name]]
    if changed and not force:
        raise RecipeError(
            f"{checkpoint} was made from something else ({'; '.join(changed)}). Set another `output_dir`, "
            "`resume_from_checkpoint: never`, or `force_resume: true` to resume all the same."
        )
    old, new = before["recipe"], record["recipe"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            logger.warning(
                "The recipe has changed since %s: %s: %s -> %s", checkpoint.name, name, old.get(name), new.get(name)
            )


def rotate(output_dir: Path, limit: int | None, max_gb: float | None, best: str | None) -> None:
    """Delete the least trained checkpoints while there are more than `limit`, or all together exceed `max_gb` (GB), and
    those whose save was interrupted. The last one, the best one, and what other programs saved stay."""
    complete = list_checkpoints(output_dir)
    for path in set(output_dir.glob("checkpoint-*")) - set(complete):
        if (path / BEGUN).exists():
            shutil.rmtree(path)
    sizes = {path: sum(json.loads((path / MANIFEST).read_text())["files"].values()) / 1e9 for path in complete}
    for path in complete[:-1]:
        too_many = limit is not None and len(sizes) > limit
        too_large = max_gb is not None and sum(sizes.values()) > max_gb
        if (too_many or too_large) and path != Path(best or ""):
            shutil.rmtree(path)
            del sizes[path]
