"""A Slurm cluster of two nodes on this machine, on loopback, each with one pretended GPU."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-2")  # the first one's name is the address at which the others meet it
SLURM_CONF = """
ClusterName=test
SlurmctldHost={nodes[0]}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:1
NodeName={nodes[1]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:1
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def slurm_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips the test where Slurm is not installed, or the user is not root."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
    missing = [name for name in ("sbatch", "slurmctld", "slurmd") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd must be started by root")
    for name in NODES:
        (folder / name).mkdir(parents=True)
    conf = SLURM_CONF.format(nodes=NODES, folder=folder, ports=free_ports(3), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File=/dev/null\n" for name in NODES))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    commands = [["slurmctld"], *(["slurmd", "-N", name] for name in NODES)]
    daemons = [subprocess.Popen([*command, "-D"], **null) for command in commands]
    try:
        deadline, states = time.monotonic() + 30, ["sinfo", "-hN", "-o", "%t"]
        while subprocess.run(states, capture_output=True, text=True).stdout.split() != ["idle"] * 2:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"])
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
