"""Every command, path, recipe and code block in the documentation is checked here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from textwrap import dedent, indent

import pytest
from conftest import ROOT, options, short_recipe
from lm_eval.config.evaluate_config import EvaluatorConfig
from typer.testing import CliRunner

from tunebook.files import read_yaml
from tunebook.following import validate_callbacks
from tunebook.following.benchmarks import find_benchmark
from tunebook.recipe import TASKS, parse, read_command_line, read_recipe
from tunebook.tools.cli import app

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "recipes" / "README.md"]


def blocks(language: str) -> list[str]:
    return [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


COMMANDS = sorted(
    {line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_docs_is_one(command):
    words = shlex.split(command, comments=True)
    if words[0] in ("pip", "uv"):
        extras = re.findall(r"\w[\w-]*", "".join(re.findall(r"\.\[(.*)\]", command)))
        assert (
            set(extras)
            <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
        )
    elif words[0] == "make":
        assert re.search(rf"^[a-z ]*\b{words[1]}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "tunebook":
        known = {name for name in CliRunner().invoke(app, [words[1], "--help"]).output.split() if name.startswith("--")}
        assert {word for word in words if word.startswith("--")} <= known
        assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0
    else:
        assert words[:2] == ["accelerate", "launch"]
        script = next(word for word in words if word.startswith("src/"))
        config, overrides = read_command_line(words[words.index(script) + 1 :])
        parse(script.removeprefix("src/").removesuffix(".py"), read_recipe(ROOT / config), overrides)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_in_the_docs_parses(block):
    parse("sft", read_yaml(block, "the docs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_in_the_docs_exists(page):
    links = re.findall(r"\]\(([^)h#][^)#]*)[^)]*\)", page.read_text())
    paths = re.findall(r"`((?:src|recipes|configs|data|launch|tests|perf|docs)/[\w./-]+)`", page.read_text())
    for path in [page.parent / link for link in links] + [ROOT / path for path in paths]:
        assert path.exists(), path


def test_every_key_that_the_docs_name_exists():
    """`key: value` in code spans of the docs."""
    known = {name for classes in TASKS.values() for cls in classes for name in cls.__dataclass_fields__}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+): [^`]*`", page.read_text()):
            assert name in known, (page, name)


# ---- docs/extending.md ---------------------------------------------------------------------------------------------


def insert(path, anchor: str, block: str) -> None:
    """Writes a block of the page below the line of a file that begins with `anchor`, indented as that is."""
    lines = path.read_text().splitlines(keepends=True)
    [place] = [i for i, line in enumerate(lines) if line.strip().startswith(anchor)]
    indentation = lines[place][: -len(lines[place].lstrip())]
    path.write_text("".join([*lines[: place + 1], indent(dedent(block), indentation), *lines[place + 1 :]]))


@pytest.mark.slow
def test_a_key_and_a_callback_are_added_as_the_page_says(tiny, sft_rows, tmp_path):
    """In a copy of the package; one run has both."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    page = (ROOT / "docs" / "extending.md").read_text()
    declaration, use, callback = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    package = tmp_path / "src" / "tunebook"
    insert(package / "recipe" / "configs.py", "dry_run: bool = ", declaration)
    insert(package / "training" / "progress.py", "rate = ", use)
    (tmp_path / "my_callbacks.py").write_text(callback)

    def run(**keys) -> subprocess.CompletedProcess:
        recipe = short_recipe(tiny, sft_rows, tmp_path / "o", save_strategy="steps", save_steps=2, **keys)
        command = [sys.executable, str(tmp_path / "src" / "sft.py"), *options(recipe)]
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    assert "`min_tokens_per_second`: input should be greater than 0" in run(min_tokens_per_second=-1).stderr
    done = run(min_tokens_per_second=1e9, callbacks=["my_callbacks:Notify"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Training is slow" in done.stderr
    assert (tmp_path / "o" / "saved.txt").read_text() == "step 2\nstep 3\n"


def test_a_benchmark_is_added_as_the_page_says(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text()
    path = tmp_path / "gsm8k_short.yaml"
    path.write_text(re.search(r"```text\n(.*?)```", page, re.DOTALL)[1])
    assert find_benchmark(str(path)) == path.resolve()
    assert EvaluatorConfig.from_config(path).limit == 100


@pytest.mark.parametrize("name", ["json:dumps", "nowhere:Callback", "Callback"])
def test_a_callback_that_is_none_is_refused_by_name(name, tmp_path, tiny, sft_rows):
    keys = short_recipe(tiny, sft_rows, tmp_path, callbacks=[name])
    with pytest.raises(ValueError, match=f"`callbacks`: {name}"):
        validate_callbacks(parse("sft", keys).training, resumes=False)
