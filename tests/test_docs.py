"""Every command, path, recipe and code block in the documentation is checked here."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT
from typer.testing import CliRunner

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
    words = shlex.split(command)
    if words[0] == "make":
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
    parse("sft", yaml.safe_load(block) | {"learning_rate": 2e-5})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_in_the_docs_exists(page):
    links = re.findall(r"\]\(([^)h#][^)#]*)[^)]*\)", page.read_text())
    paths = re.findall(r"`((?:src|recipes|configs|data|launch|tests|perf|docs)/[\w./-]+)`", page.read_text())
    for path in [page.parent / link for link in links] + [ROOT / path for path in paths]:
        assert path.exists(), path


@pytest.mark.parametrize("task", TASKS)
def test_every_key_that_the_docs_name_exists(task):
    """`key: value` in code spans of the docs."""
    known = {name for classes in TASKS.values() for cls in classes for name in cls.__dataclass_fields__}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+): [^`]*`", page.read_text()):
            assert name in known, (page, name)
