"""Several nodes: a Slurm job of two, and two hosts made of network namespaces, with gloo in NCCL's place."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, assert_same_weights, launch, launch_command, options, short_recipe
from slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slow
KEYS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
KEYS |= {"global_batch_size": 8, "per_device_train_batch_size": 2}


def wait_for(condition, seconds: float, message=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.01)


def rank_process(launcher: subprocess.Popen) -> psutil.Process:
    """The last of the launcher's training processes."""
    return [p for p in psutil.Process(launcher.pid).children() if "src/sft.py" in p.cmdline()][-1]


@pytest.fixture(scope="module")
def uninterrupted(tiny, sft_rows, tmp_path_factory):
    """Output folder of a run of two processes on one host."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = launch("src/sft.py", *options(short_recipe(tiny, sft_rows, folder, **KEYS)), config="zero3", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def hosts():
    """Names of two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2 at eth0."""
    names = [f"tunebook-{os.getpid()}-{i}" for i in (1, 2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"]
    for i, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{i}/24 dev eth0", f"-n {name} link set eth0 up"]
        commands += [f"-n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {command}: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("network namespaces need iproute2: no ip")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(hosts, keys, log_folder) -> list[subprocess.Popen]:
    """The command of docs/scaling.md on each host."""
    launchers = []
    for rank, host in enumerate(hosts):
        flags = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "10.77.0.1", "main_process_port": 29500}
        command = launch_command("src/sft.py", *options(keys), config="zero3", processes=2, **flags)
        command, env = ["ip", "netns", "exec", host, *command], {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
        log = open(log_folder / f"{rank}.log", "w")
        launchers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=log))
    return launchers


def test_two_hosts_end_with_a_rank_that_dies_and_resume_to_the_weights_of_one_host(
    hosts, uninterrupted, tiny, sft_rows, tmp_path
):
    keys = short_recipe(tiny, sft_rows, tmp_path / "o", **KEYS)
    launchers = start_on(hosts, keys, tmp_path)
    wait_for((tmp_path / "o" / "checkpoint-4" / "manifest.json").exists, 300, (tmp_path / "0.log").read_text)
    rank_process(launchers[1]).kill()
    assert all(launcher.wait(60) for launcher in launchers)
    assert "rank      : 1" in (tmp_path / "1.log").read_text() and "SIGKILL" in (tmp_path / "1.log").read_text()
    assert not (tmp_path / "o" / "model.safetensors").exists()

    for launcher in start_on(hosts, keys, tmp_path):
        assert launcher.wait(300) == 0, (tmp_path / "0.log").read_text()
    assert "checkpoint-4" in (tmp_path / "0.log").read_text()
    assert_same_weights(tmp_path / "o", uninterrupted)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    with slurm_cluster(tmp_path / "slurm", monkeypatch):
        yield


def show_job(number: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def test_a_slurm_job_of_two_nodes_that_is_requeued_resumes(slurm, uninterrupted, tiny, sft_rows, tmp_path, monkeypatch):
    keys, log = short_recipe(tiny, sft_rows, tmp_path / "o", **KEYS), tmp_path / "log.txt"
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_GRES", "gpu:1")
    monkeypatch.setenv("SBATCH_OUTPUT", str(log))
    make = ["make", "--silent", "--old-file", "install", "slurm", "TASK=sft", f"RECIPE={tmp_path}/recipe.yaml"]
    make += ["NODES=2", "ACCELERATE=zero3", "ARGS=--seed 42"]
    submitted = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    wait_for((tmp_path / "o" / "checkpoint-2" / "manifest.json").exists, 300, lambda: log.read_text())
    subprocess.run(["scancel", "--batch", "--signal", "USR1", job], check=True)
    wait_for(lambda: show_job(job).get("JobState") == "PENDING", 60, log.read_text)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # Slurm would wait two minutes
    wait_for(lambda: show_job(job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED"), 300, log.read_text)
    assert show_job(job)["JobState"] == "COMPLETED" and show_job(job)["Restarts"] == "1", log.read_text()
    assert "Resuming from" in log.read_text()
    assert_same_weights(tmp_path / "o", uninterrupted)
