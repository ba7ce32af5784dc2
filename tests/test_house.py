"""The house: which room may import which, how large a file is, what the wheel holds."""

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, short_recipe

PACKAGE = ROOT / "src" / "tunebook"
ROOMS = "environment errors files checkpoints recipe data packing following training tools scripts".split()
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: tuple[str, ...]) -> str | None:
    return next((part for part in module if part in ROOMS), None)


def list_imports(path: Path) -> list[tuple[str, ...]]:
    """The modules of tunebook that a file imports, as paths from the package: ("data", "loading")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE).parts[: -node.level]
            module = tuple((node.module or "").split(".")) if node.module else ()
            found += [(*package, *module)] if module else [(*package, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tunebook":
            found.append(tuple(node.module.split(".")[1:]))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_the_rooms_above_it_only(path):
    own = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    if own is None:  # tunebook/__init__.py imports when it is called
        return
    for module in list_imports(path):
        assert ROOMS.index(room_of(module)) <= ROOMS.index(own), f"{own} imports {'.'.join(module)}"


def test_a_mistake_in_a_file_is_found_without_loading_torch():
    code = "import sys, tunebook.files; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'trl')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [path.parent for path in MODULES if path.name == "__init__.py"], ids=lambda p: p.name)
def test_every_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_above_400_lines_and_no_function_above_60(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert lines <= 60, f"{node.name} has {lines} lines"


# ---- The wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A venv with the wheel, which sees the suite's dependencies but not the checkout; its bin folder."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    suite = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{suite}\n")  # .pth files in there, of the checkout, are not read
    options = ["--no-deps", "--no-index", "--quiet", "--prefix", str(folder)]
    pip = [sys.executable, "-m", "pip", "install", "--ignore-installed", *options, str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "bin"


def run_installed(installed: Path, folder: Path, *command: str) -> str:
    """Runs `python COMMAND` in a folder, where the wheel is installed; returns what it printed."""
    env = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(["python", *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_wheel_carries_what_the_checkout_has_at_its_top(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [path for top in ("configs", "launch", "recipes", "data") for path in (ROOT / top).rglob("*.*")]
    assert shipped and {f"tunebook/shipped/{path.relative_to(ROOT)}" for path in shipped if path.is_file()} <= names
    assert {f"tunebook/scripts/{task}.py" for task in ("sft", "rm", "dpo")} <= names


@pytest.mark.slow
def test_in_an_empty_folder_the_installed_command_finds_all_that_is_shipped(installed, tmp_path):
    code = """
import tunebook
from tunebook.files import shipped
from tunebook.following.benchmarks import find_benchmark
from tunebook.recipe import parse, read_recipe
from tunebook.tools.check import read_sharding
print(tunebook.__file__, find_benchmark("gsm8k"), shipped("launch/train.slurm").exists(), read_sharding("zero3", 8))
print(parse("dpo", read_recipe("recipes/quickstart/dpo.yaml"), {"bf16": False}).script.dataset_name)
"""
    said = run_installed(installed, tmp_path, "-c", code)
    assert str(ROOT) not in said and "stage=3" in said and "data/quickstart/preferences_train.jsonl" in said
    assert "check" in run_installed(installed, tmp_path, str(installed / "tunebook"), "--help")
    assert not any(tmp_path.glob("[!.]*"))


@pytest.mark.slow
def test_the_installed_wheel_trains_a_shipped_recipe_on_shipped_rows(installed, tiny, tmp_path):
    recipe = short_recipe(tiny, "data/quickstart/sft_train.jsonl", tmp_path / "o", max_steps=2)
    keys = [part for name, value in recipe.items() if name != "dataset_name" for part in (f"--{name}", str(value))]
    run_installed(installed, tmp_path, str(installed / "tunebook"), "sft", "recipes/quickstart/sft.yaml", *keys)
    assert (tmp_path / "o" / "model.safetensors").exists()
