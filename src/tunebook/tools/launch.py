"""Launch a task's script with accelerate: on all that this machine has, or as one of several nodes."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import Interrupted, RecipeError
from ..files import find_config, read_yaml

logger = logging.getLogger(__name__)


def choose_config(devices: int, processes: object) -> str:
    """Return the name of the config for processes on machines with as many devices each."""
    return "ddp" if processes != 1 else "single" if devices else "cpu"


def read_number(variables: Mapping[str, str], *names: str, default: int) -> int:
    """Return the first of these variables that is set.

    Raises:
        RecipeError: it is not a number.
    """
    for name in names:
        if value := variables.get(name):
            if not value.isdecimal():
                raise RecipeError(f"{name} is {value}, which is not a number. Set it to one, or unset it.")
            return int(value)
    return default


def node_flags(variables: Mapping[str, str], processes: int) -> dict[str, object]:
    """Return the launcher's flags for this node, from the variables of torchrun's users or of a Slurm job step.

    Args:
        processes: on each node.

    Raises:
        RecipeError: there are several nodes, and it is not known where they meet; a variable has no sense.
    """
    nodes = read_number(variables, "NNODES", "SLURM_STEP_NUM_NODES", default=1)
    rank = read_number(variables, "NODE_RANK", "SLURM_NODEID", default=0)
    port = 20000 + read_number(variables, "SLURM_JOB_ID", default=9500) % 10000
    port = read_number(variables, "MASTER_PORT", default=port)
    if not rank < nodes:
        raise RecipeError(f"NODE_RANK is {rank}, and NNODES is {nodes}. The nodes are numbered from 0.")
    if nodes == 1:
        return {"num_processes": processes}
    address = variables.get("MASTER_ADDR")
    if address is None and (hosts := variables.get("SLURM_STEP_NODELIST")) is not None:
        shown = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        address = shown.stdout.split()[0]
    if address is None:
        raise RecipeError(f"NNODES is {nodes}, and MASTER_ADDR is not set. Set it to the host name of the first node.")
    flags = {"num_machines": nodes, "machine_rank": rank, "main_process_ip": address, "main_process_port": port}
    return {"num_processes": processes * nodes, **flags}


def launch(task: str, words: Sequence[str], config: str | None, processes: int | None) -> int:
    """Launch a task's script; return its exit code. The script has said what was wrong, so the launcher does not.

    Args:
        words: the recipe and its overrides, as the script takes them.
        config: file or name of an accelerate config. Default: what uses all devices of this machine.
        processes: on each node. Default: one for each device; for a config of a CPU, one.

    Raises:
        RecipeError: for a config that does not exist or is for fewer processes, or nodes that cannot meet.
    """
    devices = torch.cuda.device_count()
    flags = node_flags(os.environ, processes or devices or 1)
    path = find_config(config or choose_config(devices, flags["num_processes"]))
    if read_yaml(path.read_text(encoding="utf-8"), str(path)).get("distributed_type") == "NO":
        if "num_machines" in flags or processes not in (None, 1):
            raise RecipeError(f"{path.name} is for one process. Take another with --accelerate, such as ddp or zero3.")
        flags = {"num_processes": 1}
    if devices == 0:
        cores = max(1, (os.cpu_count() or 1) // (processes or 1))
        flags["num_cpu_threads_per_process"] = os.environ.get("OMP_NUM_THREADS", cores)
    arguments = [f"--{name}={value}" for name, value in ({"config_file": path} | flags).items()]
    logger.info("accelerate launch %s -m tunebook.scripts.%s %s", " ".join(arguments), task, " ".join(words))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args([*arguments, "-m", f"tunebook.scripts.{task}", *words]))
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except SignalException as error:  # of a launcher of several processes, which has ended them
        code = -error.sigval
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except Interrupted as error:
        children = psutil.Process().children()
        if error.number == signal.SIGTERM:  # Ctrl-C reaches them from the terminal
            for child in children:
                child.terminate()
        psutil.wait_procs(children)
        code = -error.number
    else:
        return 0
    if code > 0:
        return code
    if -code not in (signal.SIGINT, signal.SIGTERM):
        hint = " It may have used up the memory of the host." if -code == signal.SIGKILL else ""
        logger.error("A training process was ended by %s.%s", signal.Signals(-code).name, hint)
    return 128 - code
