"""`tunebook sft RECIPE`: what accelerate is given, and how a run ends."""

import subprocess
import sys

import pytest
from conftest import ROOT
from typer.testing import CliRunner

import tunebook
from tunebook.errors import RecipeError
from tunebook.files import find_config
from tunebook.tools.cli import app
from tunebook.tools.launch import choose_config, launch, node_flags

MEET = {"main_process_ip": "first", "main_process_port": 29500}


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, {"num_processes": 8}),
        ({"NNODES": "1", "MASTER_ADDR": "first"}, {"num_processes": 8}),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, {"num_processes": 8}),  # of a job, outside its steps
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"},
            {"num_processes": 16, "num_machines": 2, "machine_rank": 1, **MEET},
        ),
        (
            {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3", "SLURM_JOB_ID": "10007", "MASTER_ADDR": "first"},
            {"num_processes": 32, "num_machines": 4, "machine_rank": 3, **MEET, "main_process_port": 20007},
        ),
    ],
)
def test_nodes_are_those_of_the_environment(variables, flags):
    assert node_flags(variables, processes=8) == flags


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"NNODES": "1:2", "MASTER_ADDR": "first"}, "NNODES is 1:2, which is not a number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "first"}, "NODE_RANK is 2, and NNODES is 2"),
        ({"NNODES": "2", "MASTER_PORT": "http", "MASTER_ADDR": "first"}, "MASTER_PORT is http"),
    ],
)
def test_variables_of_nodes_that_cannot_meet_are_refused(variables, message):
    with pytest.raises(RecipeError, match=message):
        node_flags(variables, processes=1)


@pytest.mark.parametrize(
    ("devices", "processes", "name"),
    [(0, 1, "cpu"), (0, 2, "ddp"), (1, 1, "single"), (1, 2, "ddp"), (8, 8, "ddp")],  # (1, 2): of two nodes
)
def test_a_config_is_chosen_for_all_processes(devices, processes, name):
    path = find_config(choose_config(devices, processes))
    assert path.resolve() == ROOT / "configs" / "accelerate" / f"{name}.yaml"


@pytest.mark.parametrize("asked", [{"NNODES": "2", "MASTER_ADDR": "first"}, None])
def test_a_config_of_one_process_is_refused_for_more(asked, monkeypatch):
    for name, value in (asked or {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="cpu.yaml is for one process"):
        launch("sft", [], "cpu", None if asked else 2)


def test_a_config_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(RecipeError, match="no accelerate config zero9(.*)zero3"):
        find_config("zero9")


@pytest.mark.slow
def test_a_mistake_is_one_message_and_its_exit_code_the_scripts(tmp_path):
    command = [sys.executable, "-c", "from tunebook.tools.cli import app; app()", "sft"]
    command += ["recipes/quickstart/sft.yaml", "--learning_rat", "1", "--output_dir", str(tmp_path / "o")]
    command += ["--accelerate", "ddp", "--num-processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("is not a key") == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_shipped_recipes_are_listed_with_their_hardware_and_copied(tmp_path):
    shown = CliRunner().invoke(app, ["recipes"]).output
    assert {str(path.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/**/*.yaml")} == {
        line.split()[0] for line in shown.splitlines()
    }
    assert all(len(line.split()) > 2 for line in shown.splitlines())
    name, copy = "qwen3-1.7b/sft/full.yaml", tmp_path / "mine.yaml"
    for recipe, out in ((name, copy), (f"recipes/{name}", tmp_path / "b" / "c.yaml")):
        assert CliRunner().invoke(app, ["recipes", recipe, str(out)]).exit_code == 0
        assert out.read_bytes() == (ROOT / "recipes" / name).read_bytes()


def test_the_version_is_shown():
    assert CliRunner().invoke(app, ["--version"]).output == f"{tunebook.__version__}\n"
