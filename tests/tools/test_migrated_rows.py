"""A migrated recipe trains on the tokens on which the other tool trains."""

import json

import pytest
from conftest import read_cases, write_rows

from tunebook.files import write_yaml
from tunebook.recipe import parse
from tunebook.tools.migrate import migrate
from tunebook.tools.preview import CONTEXT, TRAINED, preview_rows


def marked(tokens) -> str:
    """The text of a row, with what is trained in guillemets."""
    text, before = "", CONTEXT
    for token in tokens:
        if (TRAINED in token.marks) != (before == TRAINED):
            text += "«" if TRAINED in token.marks else "»"
        before = TRAINED if TRAINED in token.marks else CONTEXT
        text += token.text
    return text + "»" * (before == TRAINED)


@pytest.mark.parametrize("case", read_cases("tools/migrated_rows.yaml"), ids=lambda case: case["name"])
def test_a_row_is_trained_as_the_other_tool_trains_it(case, tiny, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [case["row"]] * 3)
    (tmp_path / "data").mkdir()
    info = {"rows": {"file_name": str(path), **case.get("info", {})}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    settings = tmp_path / "sft.yaml"
    settings.write_text(write_yaml(case["given"]).replace("ROWS", str(path)))
    done = migrate(str(settings))
    changes = {"model_name_or_path": str(tiny), "output_dir": str(tmp_path / "o"), "bf16": False, "dtype": "float32"}
    given = {name: value for name, value in done.recipe.items() if name not in ("max_train_samples", "tf32")}
    shown, _ = preview_rows(parse(done.task, given | changes), 1)
    assert [marked(tokens) for tokens in shown[0].values()] == case["texts"]
