"""What the launcher's environment says: ranks, FSDP, DeepSpeed. No other module reads it."""

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

BUILD_SILENCE = 300  # seconds without a new file, after which nobody builds an operator any more

# With what launchers set, lm-eval would wait for the other ranks of a job that it is not part of
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "SLURM_")
LAUNCHER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}


@dataclass(frozen=True)
class Sharding:
    """How accelerate spreads a run."""

    engine: str = "none"  # or "ddp", "deepspeed", "fsdp"
    processes: int = 1
    stage: int = 0  # ZeRO's; 3 under FSDP
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def is_zero3(self) -> bool:
        return self.engine == "deepspeed" and self.stage == 3


SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")


def secrets() -> dict[str, str]:
    """Return the environment's variables that hold secrets, as their names say."""
    return {name: value for name, value in os.environ.items() if SECRET.search(name.upper()) and len(value) >= 8}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def shows_tracebacks() -> bool:
    return os.environ.get("TUNEBOOK_LOG_LEVEL", "").lower() == "debug"


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def is_open(path: Path) -> bool:
    """Return whether a process of this user and host has a file open."""
    import psutil  # which a start without a lock need not wait for

    name = str(path.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == name for file in process.open_files()):
                return True
    return False


def free_build_locks() -> None:
    """Remove the locks that processes which were killed while they loaded an operator of DeepSpeed have left.

    `torch.utils.cpp_extension` would wait for them without an end. Another host may share the folder and hold one, so
    that a lock which no process of this host has open is taken when no file beside it changes.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        if is_open(lock):
            continue
        logger.warning(
            "%s is held by no process of this host. It is removed if nothing is built beside it for %d s.",
            *(lock, BUILD_SILENCE),
        )
        with suppress(FileNotFoundError):
            while time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir()) < BUILD_SILENCE:
                lock.stat()
                time.sleep(1)
            lock.unlink()


def uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def fsdp_version() -> int:
    return int(os.environ.get("FSDP_VERSION", 1))


def fsdp_state_dict_type() -> str:
    default = "FULL_STATE_DICT" if fsdp_version() == 1 else "SHARDED_STATE_DICT"  # as accelerate has it
    return os.environ.get("FSDP_STATE_DICT_TYPE", default)


def offloads_fsdp() -> bool:
    return os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"


def uses_parallelism_config() -> bool:
    """Return whether the accelerate config has a parallelism_config (cp_size, tp_size, ...)."""
    return os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"


def launched_sharding(args: "TrainingArguments") -> Sharding:
    """Return the sharding of the launch that `args` was built in."""
    if args.deepspeed_plugin is not None:
        return zero_sharding(args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}), args.world_size)
    if uses_fsdp():
        return fsdp_sharding(offloads_fsdp(), args.world_size)
    return unsharded(args.world_size)


def zero_sharding(zero: Mapping[str, Any], processes: int) -> Sharding:
    """Return the sharding of a DeepSpeed config's `zero_optimization`."""
    offloads = [(zero.get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme") for what in ("optimizer", "param")]
    return Sharding("deepspeed", processes, zero.get("stage", 0), *offloads)


def fsdp_sharding(offloads: bool, processes: int) -> Sharding:
    return Sharding("fsdp", processes, 3, offloads, offloads)


def unsharded(processes: int) -> Sharding:
    return Sharding("ddp" if processes > 1 else "none", processes)


def without_launcher(variables: Mapping[str, str], device: str | None = None) -> dict[str, str]:
    """Return `variables` without those of the launcher or the Slurm job around this process.

    Args:
        device: CUDA_VISIBLE_DEVICES of the result. Default: unchanged.
    """
    kept = {
        name: value
        for name, value in variables.items()
        if name == "SLURM_CONF" or not (name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES))
    }
    return kept if device is None else {**kept, "CUDA_VISIBLE_DEVICES": device}
