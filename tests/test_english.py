"""The prose of the tree: patterns that a native reader stumbles over stay out of it."""

import ast
import re

import pytest
from conftest import ROOT

UNITS = "step|second|token|row|parameter|GPU|device|process|epoch|node|query|matrix|pair|weight|batch|checkpoint|rank"
PATTERNS = {
    r"\b(is|are|was|were|be) (told|said)\b(?! apart)": "is logged, is reported",
    r"\b(go|goes|going|gone|went) on\b": "resume, continue",
    r"\bbeside (?!it\b|training\b|or\b|with\b)[a-z]": "besides, other than, in addition to, next to",
    r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b|less\b)[a-z]": "is not a",
    r"\b(mend|mends|mended|mending|dear)\b": "fix, expensive",
    r"\bso many\b": "this many",
    rf"\b(rows|tokens|bytes|pairs|samples|batches|FLOPs|state|passes|GB|MB|FLOP/s) an? ({UNITS})\b(?! has)": "per",
}
NOT_VERBS = {"Of", "From", "Which", "What", "Whether", "Where", "By", "When", "How", "As", "The", "A", "An", "These"}
FOLDERS = ["src", "perf", "tests", "docs", "recipes", "configs", "launch", ".ci", ".github"]
NAMES = (".py", ".md", ".yaml", ".yml", ".slurm", ".jinja", ".html", "run")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.name.endswith(NAMES)]
FILES += [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "data/quickstart/README.md")
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_nowhere_in_the_tree(pattern):
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if path.name != "test_english.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not lines, f"write {PATTERNS[pattern]}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("src/**/*.py")), ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_docstring_of_a_function_begins_with_a_verb(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            assert docstring.split()[0] not in NOT_VERBS, f"{node.name}: {docstring.splitlines()[0]}"
