"""The page of a run: what is on it is what the run logged, it stands alone, and it can be made from what is left."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
from conftest import train
from PIL import Image
from typer.testing import CliRunner

from tunebook import run_script
from tunebook.errors import RecipeError
from tunebook.files import append_rows, read_rows
from tunebook.following.report import (
    RECORD_FILE,
    draw_figures,
    new_figure,
    pair_generations,
    read_rewards,
    read_run,
    report_run,
    write_report,
)
from tunebook.following.scores import BenchmarkRow
from tunebook.tools.cli import app

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def trainers(tiny, sft_rows, pair_rows, tmp_path_factory):
    """A run of each task, evaluated and saved every 2 steps of 4."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    keys |= {"test_split_size": 8, "eval_strategy": "steps", "eval_steps": 2}
    prompts = {"eval_prompts": [SCRIPT, "what is 2 plus 2?"], "eval_on_start": True}
    prompts["eval_generation_kwargs"] = {"max_new_tokens": [3, 6], "do_sample": False}
    trained = {task: train(task, tiny, pair_rows, folder / task, **keys) for task in ("rm", "dpo")}
    return folder, trained | {"sft": train("sft", tiny, sft_rows, folder / "sft", **keys, **prompts)}


@pytest.fixture
def run(trainers, tmp_path):
    """A copy of the SFT run, to be spoilt."""
    shutil.copytree(trainers[0] / "sft", tmp_path / "sft")
    return tmp_path / "sft"


def points(figure) -> list[list[tuple[float, float]]]:
    return [[tuple(point) for point in line.get_xydata()] for line in figure.axes[0].lines]


def of_log(log_history: list[dict], key: str) -> list[tuple[float, float]]:
    return sorted({entry["step"]: entry[key] for entry in log_history if key in entry}.items())


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten_page(run) -> str:
    write_report([run], run / "report.html")
    return (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("sft", ["loss", "learning_rate", "grad_norm", "tokens_per_second", "mean_token_accuracy"]),
        ("rm", ["loss", "accuracy", "margin", "grad_norm"]),
        ("dpo", ["loss", "rewards/margins", "accuracy", "tokens_per_second"]),
    ],
)
def test_the_curves_are_what_was_logged(trainers, task, keys):
    folder, trained = trainers
    figures = draw_figures([read_run(folder / task, task)])
    log = trained[task].state.log_history
    for key in keys:
        curves = [curve for curve in (of_log(log, key), of_log(log, f"eval_{key}")) if curve]
        assert points(figures[key.replace("/", "_")]) == curves and len(curves[0]) == 4


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_run_ends_with_a_page_and_pictures_that_open(trainers, task):
    folder = trainers[0] / task
    page = (folder / "report.html").read_text()
    pictures = sorted((folder / "report").glob("*.png"))
    assert {"loss.png", "learning_rate.png"} <= {picture.name for picture in pictures}
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert len(image.getcolors(image.width * image.height)) > 2
    record = json.loads((folder / "record.json").read_text())
    shown = [record["data"], record["rows"]["train"], record["versions"]["trl"], "learning_rate: 0.01"]
    assert all(text in page for text in [*shown, "4 of 4", record["model"]])


def test_the_page_stands_alone(trainers):
    for task in ("sft", "rm", "dpo"):
        page = (trainers[0] / task / "report.html").read_text()
        addresses = re.findall(r'(?i)\b(?:src|srcset|href)="?([^"\s>]+)', page)
        assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
        assert not re.search("(?i)<(script|link|iframe)", page)


def test_what_a_recipe_and_a_model_say_is_text(trainers):
    page = (trainers[0] / "sft" / "report.html").read_text()
    assert SCRIPT not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3  # recipe, and both settings


def test_generations_are_those_of_the_first_and_the_last_evaluation(trainers):
    rows = read_rows(trainers[0] / "sft" / "generations.jsonl")
    before, after = ([row["output"] for row in rows if row["step"] == step] for step in (0, 4))
    prompts = [f"{row['prompt']}\nmax_new_tokens {row['max_new_tokens']}" for row in rows if row["step"] == 0]
    header, *pairs = pair_generations(read_run(trainers[0] / "sft", "sft"))
    assert pairs == list(zip(prompts, before, after, strict=True)) and len(pairs) == 4
    assert header == ("Prompt", "Before (step 0)", "After (step 4)")


def test_the_histogram_counts_every_pair_of_the_last_evaluation(trainers):
    folder, trained = trainers
    run = read_run(folder / "rm", "rm")
    pairs = np.concatenate([batch.numpy() for batch in trained["rm"].evaluated])[:, :2]
    assert run.rewards.to_numpy() == pytest.approx(pairs, rel=1e-4)
    bars = draw_figures([run])["rewards"].axes[0].containers
    assert [sum(bar.get_height() for bar in side) for side in bars] == [8, 8]


def test_rewards_that_are_cut_or_not_finite_are_left_out(tmp_path):
    (tmp_path / "eval_rewards.csv").write_text("chosen,rejected\n1.0,2.0\ninf,0.0\n3.0,-")
    assert read_rewards(tmp_path / "eval_rewards.csv").to_numpy().tolist() == [[1.0, 2.0]]
    assert read_rewards(tmp_path / "none.csv").empty


def test_a_killed_run_is_reported_up_to_its_last_complete_checkpoint(run, trainers):
    for name in ("trainer_state.json", "report.html"):
        (run / name).unlink()
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    with (run / "generations.jsonl").open("a") as file:
        file.write('{"step": 4, "pro')
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert "2 of 4" in (run / "report.html").read_text()
    log = trainers[1]["sft"].state.log_history
    assert points(draw_figures([read_run(run, "sft")])["loss"])[0] == of_log(log, "loss")[:2]


def test_a_state_that_was_cut_is_not_read(run):
    state = run / "trainer_state.json"
    state.write_text(state.read_text()[:500])
    assert read_run(run, "sft").state["global_step"] == 4


def test_a_run_without_any_log_is_told(run):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (run / "trainer_state.json").unlink()
    assert "nothing was logged" in rewritten_page(run)


def test_values_that_are_not_finite_are_told(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for entry in history:
        entry |= {"loss": float("nan")} if "loss" in entry and entry["step"] > 1 else {}
    edit(run / "trainer_state.json", log_history=history, global_step=5)
    assert "3 of 4 values of loss are not finite" in rewritten_page(run)


def test_runs_are_compared_on_the_same_axes_with_the_keys_that_differ(run, tmp_path):
    other = tmp_path / "hotter $x^"
    shutil.copytree(run, other)
    recipe = json.loads((run / "record.json").read_text())["recipe"]
    edit(other / "record.json", recipe=recipe | {"learning_rate": 0.5, "output_dir": str(other), "weight_decay": 0.1})
    result = CliRunner().invoke(app, ["report", str(run), str(other), "--out", str(tmp_path / "both.html")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both.html").read_text()
    table = page[page.index("Differences") : page.index("Recipe, sft")]
    assert "learning_rate" in table and "0.5" in table and "default" in table and "max_steps" not in table
    axes = draw_figures([read_run(run, "sft"), read_run(other, other.name)])["loss"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sft", "hotter $x^"]
    assert len(axes.lines) == 4 and len({line.get_color() for line in axes.lines}) == 2


@pytest.mark.parametrize("rows", ["same", "other"])
def test_runs_that_were_evaluated_on_different_rows_are_told_apart(rows, run, trainers, tmp_path):
    if rows == "other":
        edit(run / RECORD_FILE, evaluation="0123")
    write_report([trainers[0] / "sft", run], tmp_path / "compared.html")
    assert ("were evaluated on different rows" in (tmp_path / "compared.html").read_text()) == (rows == "other")


def test_scores_of_benchmarks_are_curves_with_their_errors(run):
    for step, score in ((2, 0.25), (4, 0.75), (None, 0.1)):
        row = BenchmarkRow(step, "sums", "m", scores={"sums": {"acc": score}}, stderr={"sums": {"acc": 0.05}})
        append_rows(run / "benchmarks.jsonl", [vars(row)])
    axes = draw_figures([read_run(run, "sft")])["benchmark_sums_acc"].axes[0]
    assert [tuple(point) for point in axes.lines[0].get_xydata()] == [(2, 0.25), (4, 0.75)]
    [bars] = axes.collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.2, 0.3]), pytest.approx([0.7, 0.8])]


@pytest.mark.parametrize(("value", "text"), [(5e-5, "5e−05"), (0.1 + 0.2, "0.3"), (0.0, "0"), (12500.0, "12,500")])
def test_ticks_are_short(value, text):
    assert new_figure("Loss", "loss").axes[0].yaxis.get_major_formatter()(value) == text


def test_where_a_run_was_resumed_is_told(run, tiny, sft_rows):
    recipe = json.loads((run / "record.json").read_text())["recipe"]
    del recipe["eval_prompts"], recipe["eval_generation_kwargs"]
    run_script("sft", recipe | {"output_dir": str(run), "max_steps": 5})
    assert json.loads((run / "checkpoint-5" / "manifest.json").read_text())["resumed_from"] == ["checkpoint-4"]
    page = (run / "report.html").read_text()
    assert "checkpoint-4" in page and "5 of 5" in page
    assert len(points(draw_figures([read_run(run, "sft")])["loss"])[0]) == 5


def test_another_folder_or_kind_of_file_is_refused(run, tmp_path):
    with pytest.raises(RecipeError, match="not the folder of a run.*no record.json"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(RecipeError, match="report.pdf does not end in .html"):
        write_report([run], tmp_path / "report.pdf")


def test_a_report_that_cannot_be_written_fails_nothing(run, caplog):
    shutil.rmtree(run / "report")
    (run / "report").write_text("")
    with caplog.at_level(logging.WARNING):
        report_run(run)
    assert "There is no report of" in caplog.text
