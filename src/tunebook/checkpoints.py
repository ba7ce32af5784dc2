"""Checkpoints: which one is complete, what it was made from, and which one to resume from.

A checkpoint is complete when its manifest.json is there. The manifest is written last, and older checkpoints are
deleted only after that: however a run ends, the newest one is complete. It is whole when every file, and the manifest
itself, has the size and the checksum that the manifest holds; a run resumes from whole checkpoints only.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, cast

import xxhash

from .errors import RecipeError

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)

MANIFEST = "manifest.json"
BEGUN = f"{MANIFEST}.partial"  # in a checkpoint that is being saved, or whose save was interrupted
FIXED = ("data", "seed", "order", "reference", "adapter")  # a run with a different one is a different run
SET_BACK = "Set that back, or another `output_dir`, or `resume_from_checkpoint: never`"
# How Python, safetensors and torch.save, which loses the error's number, report a full disk or quota
FULL = re.compile(rf"(Errno|os error) ({errno.ENOSPC}|{errno.EDQUOT})\b|inline_container\.cc")


class Progress(TypedDict):
    """How far training has come."""

    epoch: int
    samples_in_epoch: int
    consumed_samples: int
    global_batch_size: int
    world_size: int
    share_prefix: bool
    num_tokens: int


class Record(TypedDict, total=False):
    """What a run is made of, before its rows are read and after; the JSON of record.json."""

    task: str
    model: str
    weights: str
    adapter: str | None  # that is trained further
    evaluation: str | None  # fingerprint of its rows
    reference: str | None
    seed: int
    order: Mapping[str, object]
    trained: Mapping[str, object]
    optim: str
    engine: str
    learning_rate: float
    data: str
    recipe: dict[str, Any]
    rows: dict[str, str]
    versions: dict[str, str]
    resumed_from: list[str]
    parameters: str


class Manifest(Record, Progress):
    """The JSON of a checkpoint's manifest."""

    train_loss: float
    files: dict[str, int]  # name -> bytes
    checksums: dict[str, str]


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
    except Exception as error:  # tokenizers raises a bare one
        if not is_full(error):
            raise
        message = str(error).partition("\n")[0]
        free = shutil.disk_usage(output_dir).free
        raise DiskFullError(
            f"{what} could not be saved, {free / 1e6:.1f} MB are free for {output_dir}: {message}\n"
            f"{resume_point(output_dir)} Make room first."
        ) from error


def resume_point(output_dir: Path) -> str:
    """Return, in words, which checkpoint is whole and what the same command does."""
    if whole := list_checkpoints(output_dir):
        return f"{whole[-1].name} is whole. The same command resumes from {whole[-1].name}."
    return "There is no checkpoint. The same command resumes from the start."


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Warn, once, when a disk fills while something is written that the run does not need."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        warn_once("There is no room for %s. The run continues without it.", what)


def is_full(error: Exception) -> bool:
    """Return whether an error says that a disk is full."""
    return not isinstance(error, RecipeError) and FULL.search(str(error)) is not None


def begin(folder: Path) -> None:
    """Mark a checkpoint as ours and incomplete before it is written, whatever its folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).touch()
    (folder / MANIFEST).unlink(missing_ok=True)


class DamagedError(Exception):
    """A complete checkpoint is not what was saved, or cannot be read."""


def checksum(path: Path) -> str:
    """Return the XXH3 hash of a file, which takes about 0.1 s per GB in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> [`checksum`] of files of a folder."""
    names = list(names)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(folder / name), names), strict=True))


def own_checksum(manifest: Mapping[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest).encode())


def write_manifest(folder: Path, record: Record, progress: Progress, train_loss: float) -> None:
    """Declare a checkpoint complete.

    Args:
        record: what it was made from.
        progress: how far training has come.
        train_loss: the mean over the steps of all starts of the run.
    """
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in (MANIFEST, BEGUN):
        files.pop(name, None)
    manifest: Manifest = {
        **record,
        **progress,
        "train_loss": train_loss,
        "files": files,
        "checksums": checksums(folder, files),
    }
    with open(folder / BEGUN, "w", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": own_checksum(manifest)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    (folder / BEGUN).replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete checkpoint; None for an incomplete one.

    Raises:
        DamagedError: the manifest cannot be read or has changed, or a file is missing or has another size.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or manifest.pop("checksum", None) != own_checksum(manifest):
            raise DamagedError(f"{MANIFEST} does not match its checksum")
        for name, size in manifest["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise DamagedError(f"{name} has {found:,} bytes instead of {size:,}")
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / MANIFEST).is_file():
            raise DamagedError(f"{Path(error.filename).name} is missing") from error
        return None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    return cast(Manifest, manifest)


def whole_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint that is known to be complete."""
    manifest = read_manifest(folder)
    assert manifest is not None, folder
    return manifest


def verify(folder: Path) -> str | None:
    """Read a checkpoint whole; return why it cannot be resumed from, or None."""
    try:
        if (manifest := read_manifest(folder)) is None:
            return f"its save was interrupted, or it is not a checkpoint of tunebook: it has no {MANIFEST}"
        found = checksums(folder, manifest["files"])
    except (DamagedError, OSError) as error:
        return f"it is damaged: {error}"
    changed = [name for name, expected in manifest["checksums"].items() if found[name] != expected]
    return f"it is damaged: {', '.join(changed)} has changed since it was saved" if changed else None


def complete_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint that is complete and has all files, as far as their sizes tell; else None."""
    try:
        return read_manifest(folder)
    except DamagedError:
        return None


def list_manifests(output_dir: Path) -> dict[Path, Manifest]:
    """Return the manifests of the complete checkpoints, the least trained first."""
    manifests = ((path, complete_manifest(path)) for path in checkpoint_folders(output_dir))
    complete = ((path, manifest) for path, manifest in manifests if manifest is not None)
    return dict(sorted(complete, key=lambda entry: entry[1]["consumed_samples"]))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, the least trained first."""
    return list(list_manifests(output_dir))


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Return all that looks like a checkpoint, complete or not, in the order of their steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, wish: str) -> Path | None:
    """Return the checkpoint to resume from: the last whole one (auto), none (never), or a given one.

    Raises:
        RecipeError: the given one is not whole, or there are complete ones and none is whole.
    """
    if wish == "never":
        return None
    if wish != "auto":
        if why := verify(Path(wish)):
            raise RecipeError(
                f"`resume_from_checkpoint` {wish} is not a complete checkpoint: {why}. Set it to one, or to auto."
            )
        return Path(wish)
    complete, damaged = list_checkpoints(output_dir), []
    for path in [*set(checkpoint_folders(output_dir)).difference(complete), *reversed(complete)]:
        if (why := verify(path)) is None:
            return path
        logger.warning("%s is ignored: %s.", path, why)
        if (path / MANIFEST).is_file():
            damaged.append(f"{path.name}: {why}.")
    if damaged:
        raise RecipeError(
            "\n".join([f"No checkpoint in {output_dir} can be resumed from.", *damaged])
            + "\nRestore one, or set `resume_from_checkpoint: never` to start anew."
        )
    return None


def set_aside(output_dir: Path, names: Sequence[str]) -> None:
    """Move an earlier run's checkpoints, and the files of `names`, to a folder of their own.

    A run that starts anew must not resume from them, rotate them or report their scores as its own.
    """
    saved = [path for path in checkpoint_folders(output_dir) if (path / MANIFEST).is_file()]
    left = [*saved, *filter(Path.exists, (output_dir / name for name in names))]
    if left:
        folder = output_dir / f"before-{datetime.now():%Y%m%d-%H%M%S}"
        folder.mkdir()
        for path in left:
            path.rename(folder / path.name)
        logger.warning("Moved what an earlier run left in %s to %s.", output_dir, folder.name)


def check_resume(checkpoint: Path, record: Record, force: bool) -> bool:
    """Refuse to resume another run; log what else changed since the checkpoint was made.

    Args:
        record: what the run is made of, or a part of it.

    Returns:
        Whether the run may load the optimizer's state. It may not, and starts with a new one, where `force` is set and
        there is none for this optimizer and launch.

    Raises:
        RecipeError: for other trained parameters; unless `force` is set also for another model, data set, seed, order
            of the rows, optimizer or sharding engine, and where there is no optimizer state.
    """
    before = whole_manifest(checkpoint)
    if trained := differences(before, record, ("trained",)):
        raise RecipeError(f"{checkpoint} trained other parameters: {'; '.join(trained)}. {SET_BACK}.")
    changed = differences(before, record, FIXED)
    if before.get("weights") != record.get("weights", before.get("weights")):
        changed.append(f"model: the weights of {record['model']} are not those of {before['model']} then")
    if changed and not force:
        raise RecipeError(
            f"{checkpoint} was made from something else ({'; '.join(changed)}). {SET_BACK}, or `force_resume: true` to "
            "resume all the same."
        )
    state = "global_step" if record.get("engine") == "deepspeed" else "optimizer"
    unfit = differences(before, record, ("optim", "engine"))
    if "engine" in record and not any(name.startswith(state) for name in before["files"]):
        unfit.append("it has none, as it was saved with save_only_model or under another launch")
    if unfit and not force:
        raise RecipeError(
            f"{checkpoint} has no optimizer state for this launch ({'; '.join(unfit)}). {SET_BACK}, or `force_resume: "
            "true` to resume with a new optimizer state."
        )
    if unfit and not any(name.endswith(".safetensors") for name in before["files"]):
        raise RecipeError(
            f"{checkpoint} has no weights that another launch can read ({'; '.join(unfit)}). Launch as before."
        )
    old, new = before["recipe"], record.get("recipe", before["recipe"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            logger.warning(
                "The recipe has changed since %s: %s: %s -> %s", checkpoint.name, name, old.get(name), new.get(name)
            )
    return not unfit


def differences(before: Mapping[str, object], now: Mapping[str, object], names: Sequence[str]) -> list[str]:
    """Return how values of two records differ, in words: also those of a group of keys, each by its own name."""
    lines = []
    for name in names:
        old, new = before.get(name), now.get(name, before.get(name))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences({**dict.fromkeys(new), **old}, {**dict.fromkeys(old), **new}, sorted({*old, *new}))
        elif old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def rotate(
    output_dir: Path, limit: int | None, max_gb: float | None, best: str | None, owing: Collection[Path] = ()
) -> None:
    """Delete the least trained checkpoints while there are more than `limit`, or all together exceed `max_gb` (GB), and
    those whose save was interrupted. The last one, the best one, those that still owe something, and what other
    programs saved stay."""
    sizes = {path: sum(manifest["files"].values()) / 1e9 for path, manifest in list_manifests(output_dir).items()}
    for path in set(output_dir.glob("checkpoint-*")) - set(sizes):
        if (path / BEGUN).exists():
            delete(path)
    for path in list(sizes)[:-1]:
        too_many = limit is not None and len(sizes) > limit
        too_large = max_gb is not None and sum(sizes.values()) > max_gb
        if (too_many or too_large) and path not in {Path(best or ""), *owing}:
            delete(path)
            del sizes[path]


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, or the link to one that is elsewhere."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        begin(checkpoint)  # a process that is killed leaves one that is incomplete, and not one that is damaged
        shutil.rmtree(checkpoint)
