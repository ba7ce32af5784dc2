"""Files that several rooms read and write: YAML, JSON lines, Markdown tables, whole folders, what tunebook ships."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from .errors import LINE, RecipeError, plain

logger = logging.getLogger(__name__)

T = TypeVar("T")
ROW = TypeAdapter(dict[str, Any])
PACKAGE = Path(__file__).parent
CONFIGS = Path("configs/accelerate")


def shipped(path: str | Path) -> Path:
    """Return where a file or folder of configs/, launch/, recipes/ or data/ is: in the wheel, else in the checkout.

    A path that exists as the user wrote it is returned unchanged, and so is one that tunebook does not ship.
    """
    path = Path(path)
    places = (path, PACKAGE / "shipped" / path, PACKAGE.parents[1] / path)
    return next((place for place in places if place.exists()), path)


def find_config(name: str) -> Path:
    """Return an accelerate config: a file, or a name in configs/accelerate.

    Raises:
        RecipeError: when there is no such file.
    """
    named = CONFIGS / f"{name}.yaml"
    path = next((path for path in (Path(name), shipped(named)) if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in shipped(CONFIGS).glob("*.yaml")))
        raise RecipeError(f"There is no accelerate config {name}. Name a file, or one of {known}.")
    return path


class Representer(SafeRepresenter):
    """Write text of several lines as a block."""

    def represent_str(self, text: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Representer.add_representer(str, Representer.represent_str)


def yaml_1_2() -> YAML:
    """Return a reader and writer of YAML 1.2, in which 2e-5 is a number, `no` a word, and a key stands once."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style, yaml.width = False, 2**16
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # ruamel.yaml has None, and no type
    return yaml


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark, with any line ends.

    Raises:
        RecipeError: when it is not in UTF-8; the message has the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file in UTF-8.") from error


def read_yaml(text: str | bytes, name: str) -> Any:  # noqa: ANN401 - what the user wrote
    """Parse YAML 1.2.

    Args:
        text: bytes are UTF-8, or UTF-16 with a byte order mark.
        name: of the file, for the message.

    Raises:
        RecipeError: `text` is not YAML, or a mapping has a key twice.
    """
    try:
        return yaml_1_2().load(text)
    except DuplicateKeyError as error:
        key = error.problem.split('"')[1]
        raise RecipeError(f"{name}, line {error.problem_mark.line + 1}: `{key}` stands twice. Remove one.") from error
    except (YAMLError, ValueError) as error:  # the latter: other bytes, or an impossible number or date
        raise RecipeError(f"{name} is not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name} is not YAML that can be read: it is nested too deeply.") from error


def write_yaml(value: object) -> str:
    """Return `value` as YAML 1.2, its keys in their order."""
    yaml_1_2().dump(value, stream := StringIO())
    return stream.getvalue()


def split_rows(path: Path, kind: TypeAdapter[T]) -> tuple[list[tuple[bytes, T]], dict[int, bytes]]:
    """Return the lines of a file that are rows, with what they say; and by number, from 1, the other lines."""
    rows, broken = [], {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            rows.append((line, kind.validate_json(line)))
        except ValidationError:
            broken[number] = line
    return rows, broken


def read_rows(path: Path, kind: TypeAdapter[T] = ROW) -> list[T]:  # type: ignore[assignment]
    """Read the rows of JSON lines, and name the other lines; no rows where there is no file."""
    rows, broken = split_rows(path, kind)
    if broken:
        logger.warning("%s: line %s is not a row and is ignored.", path, ", ".join(map(str, broken)))
    return [row for _, row in rows]


def append_rows(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    *key: str,
    kind: TypeAdapter[T] = ROW,  # type: ignore[assignment]
) -> None:
    """Append rows as JSON lines, and delete the earlier ones that are equal to a new one in all fields of `key`.

    Other lines, which a full disk may leave, are moved to a file of their own. A process that is killed
    leaves the file as it was or as it is to be.
    """
    found, broken = split_rows(path, kind)
    if broken:
        aside = path.with_name(f"{path.name}.unreadable")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in broken.values())
        logger.warning("%s: line %s is not a row and was moved to %s.", path, ", ".join(map(str, broken)), aside.name)
    new = {tuple(row[name] for name in key) for row in rows if key}
    kept = [line for line, _ in found if not new or tuple(json.loads(line)[name] for name in key) not in new]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(b"".join(line + b"\n" for line in [*kept, *(json.dumps(row).encode() for row in rows)]))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(path: Path, name: str, folder: bool = False) -> None:
    """Refuse a place that cannot be written, before the work whose result goes there.

    Args:
        name: of the key or option, for the message.
        folder: `path` is to be a folder, which may exist; else a file.

    Raises:
        RecipeError: there is something of the other kind, or the folder above it takes no file.
    """
    if path.is_dir() and not folder:
        raise RecipeError(f"{name} {path} is a folder. Set the path of a file.")
    above = path.absolute() if folder else path.absolute().parent
    above = next(parent for parent in (above, *above.parents) if os.path.lexists(parent))
    if not above.is_dir():
        raise RecipeError(f"{name} {path} cannot be written: {above} is not a folder. Set another path.")
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise RecipeError(f"{name} {path} cannot be written: {error.strerror}. Set another path.") from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write in. It becomes `out` when all went well; otherwise `out` does not appear."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parent:
        folder = Path(parent) / out.name
        folder.mkdir()
        yield folder
        folder.rename(out)


def delete_folder(folder: Path) -> None:
    """Delete a folder. A process that is killed leaves it whole, or a hidden one for the next start to delete."""
    hidden = folder.with_name(f".{folder.name}-deleted")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def terminal(text: object) -> str:
    """Return text that others may have written as rich may print it: a [`plain`] line without markup."""
    return escape(plain(text, LINE))


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; bars and line breaks in a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([plain(cell).replace("|", "&#124;").replace("\n", "<br>") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
