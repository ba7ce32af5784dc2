"""The bond with upstream: every patch has a header, no header is past its bound, the page is the list."""

import ast
import inspect

import pytest
from upstream import LIBRARIES, PACKAGE, PAGE, list_notes, list_patches, page

from tunebook.training import DPOTrainer, RewardTrainer, SFTTrainer

PATCHED_LINES = 12  # a header stands so near to what it is for


def has_header(path, first: int, last: int) -> bool:
    return any("PATCH(" in note and first - PATCHED_LINES <= line <= last for line, note in list_notes(path))


def upstream_names(tree: ast.Module) -> set[str]:
    """The names by which a file knows modules and objects of upstream libraries."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] in LIBRARIES
            }
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_attribute_of_an_upstream_module_is_assigned_without_a_header(path):
    tree = ast.parse(path.read_text())
    names = upstream_names(tree)
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("patch.object", "setattr", "mock.patch.object"):
            targets = [ast.Attribute(node.args[0], "")]
        for target in targets:
            if isinstance(target, ast.Attribute) and root_of(target) in names:
                assert has_header(path, node.lineno, node.end_lineno), f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_no_private_method_of_an_upstream_class_is_overridden_without_a_header():
    missing = set()
    for trainer in (SFTTrainer, RewardTrainer, DPOTrainer):
        ours = [cls for cls in trainer.__mro__ if cls.__module__.startswith("tunebook")]
        theirs = {name for cls in trainer.__mro__ if cls.__module__.split(".")[0] in LIBRARIES for name in vars(cls)}
        for cls in ours:
            for name, method in vars(cls).items():
                if name.startswith("_") and not name.startswith("__") and name in theirs and inspect.isfunction(method):
                    lines, first = inspect.getsourcelines(method)
                    if not has_header(PACKAGE.parent / inspect.getsourcefile(method), first, first + len(lines)):
                        missing.add(f"{cls.__name__}.{name}")
    assert not missing


def test_no_installed_version_is_past_the_bound_of_a_patch():
    due = {patch.path: patch.due for patch in list_patches() if patch.due}
    assert not due, "look whether each is still needed; delete it, or raise its bound"


def test_the_page_is_the_list_of_the_headers():
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/upstream.py writes it"
