"""The patches of upstream libraries, read from their headers.

`python tests/upstream.py` writes docs/upstream.md; with `--due` it lists the patches that an installed version is past.

# PATCH(trl<1.17): what and why. Waits for <URL or file:line>. Delete when <condition>.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from tunebook.files import markdown_table

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "tunebook"
PAGE = ROOT / "docs" / "upstream.md"
LIBRARIES = {
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "deepspeed",
    "lm_eval",
}
INTRODUCTION = """\
# Upstream

Tunebook changes TRL, transformers, accelerate, datasets, huggingface_hub and DeepSpeed in the places below, where they
have no public way yet. Each place carries a header with its cause and its end; `python tests/upstream.py` writes this
page from the headers. A test fails when an installed version is past a bound: look whether the patch is still needed,
then delete it or raise the bound. `make upstream` runs the suite with the newest releases.

"""
HEADER = re.compile(
    r"PATCH\((?P<bounds>[^)]+)\): (?P<reason>.+?\.) Waits for (?P<waits>.+?)\. Delete when (?P<until>.+?)\.", re.DOTALL
)


@dataclass(frozen=True)
class Patch:
    """A header; `bounds` are the versions that it was written for."""

    path: str
    bounds: tuple[Requirement, ...]
    reason: str
    waits: str
    until: str

    @property
    def due(self) -> list[str]:
        """The installed versions that are past a bound."""
        return [f"{r.name} {version(r.name)}" for r in self.bounds if not r.specifier.contains(version(r.name))]


def list_notes(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each docstring and of each run of comment lines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node)
    first, lines = 0, []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                first = first if lines else token.start[0]
                lines.append(token.string.lstrip("# "))
            elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT) and lines:
                yield first, " ".join(lines)
                lines = []


def list_patches() -> list[Patch]:
    """Reads every header of the package.

    Raises:
        ValueError: a header is not complete.
    """
    patches = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, note in list_notes(path):
            text = " ".join(note.split())
            found = HEADER.match(text)
            if "PATCH" in text and not found:
                raise ValueError(f"{path.name}:{line}: the header is not complete: {text[:80]}")
            if found:
                bounds = tuple(map(Requirement, found["bounds"].split(", ")))
                patches.append(
                    Patch(str(path.relative_to(ROOT)), bounds, found["reason"], found["waits"], found["until"])
                )
    return patches


def page() -> str:
    """The text of docs/upstream.md."""
    rows = [[f"`{p.path}`", ", ".join(map(str, p.bounds)), p.reason, p.waits, p.until] for p in list_patches()]
    return INTRODUCTION + markdown_table(["where", "while", "what and why", "waits for", "delete when"], rows) + "\n"


if __name__ == "__main__":
    if "--due" in sys.argv:
        installed = (f"{name} {version(name)}" for name in sorted(LIBRARIES))
        due = (f"due: {patch.path}: {', '.join(patch.due)}: {patch.reason}" for patch in list_patches() if patch.due)
        sys.stdout.write("\n".join([*installed, *due]) + "\n")
    else:
        PAGE.write_text(page(), encoding="utf-8")
