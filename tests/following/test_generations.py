"""Generations at evaluations, of one process."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model
from datasets import Dataset
from plain_trainer import make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer

from tunebook.data.layouts import Layout
from tunebook.data.rendering import Renderer, RenderSettings
from tunebook.files import read_rows
from tunebook.following import build_callbacks
from tunebook.following.generations import (
    generate,
    import_object,
    load_prompts,
    preserved_random_state,
    render_prompts,
    sweep,
    trim,
)
from tunebook.recipe.configs import ScriptArguments

GREEDY = {"max_new_tokens": 6, "do_sample": False}
PROMPTS = ["Question: What is 1 + 2?\nAnswer:", "Question", "3 is the answer to"]


def count_letters(samples, prompts, outputs):
    """A metric with trlx's signature, that also draws from Python's generator."""
    random.random()
    assert [prompt + output for prompt, output in zip(prompts, outputs, strict=True)] == samples
    return {"letters": [len(output) for output in outputs]}


def train(model: Path, out: Path, generation_kwargs: dict | None, **arguments) -> Trainer:
    """Two steps with dropout and an evaluation after each; generations if there are keyword arguments for them."""
    arguments |= {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    arguments |= {"eval_generation_kwargs": generation_kwargs, "eval_metrics": ["test_generations:count_letters"]}
    trainer = make_trainer(model, out, **arguments)
    if generation_kwargs is not None:
        for callback in build_callbacks(trainer, ScriptArguments(), PROMPTS):
            trainer.add_callback(callback)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """With dropout, so that the random state matters, and weights so large that outputs differ between prompts."""
    folder = tmp_path_factory.mktemp("model")
    changes = {"attention_dropout": 0.3, "initializer_range": 0.5, "eos_token_id": tokenizer.eos_token_id}
    build_model(len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestPrompts:
    def test_come_from_the_recipe_a_file_or_a_column(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        messages = [{"role": "user", "content": "one"}]
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n" + json.dumps({"messages": messages}))
        rows = Dataset.from_dict({"question": ["q1", "q2"]})
        assert load_prompts(["one", "two"], rows) == ["one", "two"]
        assert load_prompts([str(tmp_path / "a.txt")], rows) == ["one", "two"]
        assert load_prompts([str(tmp_path / "a.jsonl")], rows) == ["p", messages]
        for name, content in (("bom.txt", "\ufeffone\r\n \r\n"), ("bom.jsonl", '\ufeff{"prompt": "one"}\r\n')):
            (tmp_path / name).write_bytes(content.encode())
            assert load_prompts([str(tmp_path / name)], rows) == ["one"]
        assert load_prompts(["column:question"], rows) == ["q1", "q2"]

    @pytest.mark.parametrize("entry", ["column:nothing", "missing.txt"])
    def test_that_do_not_exist_are_refused_by_name(self, entry):
        with pytest.raises(ValueError, match=entry.removeprefix("column:")):
            load_prompts([entry], {})

    def test_are_read_by_the_model_through_its_template(self, tokenizer):
        asked = [{"role": "user", "content": "one"}]
        answered = [*asked, {"role": "assistant", "content": "two"}]
        turn = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"

        def read(*prompts, prompt_template=None, **settings):
            layout = Layout("prompt and completion", {}, prompt_template)
            return render_prompts(prompts, Renderer(RenderSettings("sft", tokenizer, None, layout, **settings)))

        assert read("one") == ["one"]
        assert read("one", asked, answered, apply_chat_template=True) == [turn] * 3
        assert read(asked, apply_chat_template=False) == [turn]
        system = "<|im_start|>system\nshort<|im_end|>\n"
        assert read("one", asked, apply_chat_template=True, system_prompt="short") == [system + turn] * 2
        assert read("one", prompt_template="Q: {}") == ["Q: one"]


class TestSettings:
    def test_one_list_is_swept(self):
        assert sweep({"max_new_tokens": 4}) == [{}]
        assert sweep({"do_sample": True, "temperature": [0.5, 1.0]}) == [{"temperature": 0.5}, {"temperature": 1.0}]

    def test_two_lists_are_refused_by_name(self):
        with pytest.raises(ValueError, match="temperature, top_k"):
            sweep({"temperature": [0.5, 1.0], "top_k": [1, 2]})

    def test_metric_is_imported_from_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "my_scores.py").write_text("def length(samples, prompts, outputs):\n    return {'length': [1]}\n")
        monkeypatch.chdir(tmp_path)
        assert import_object("eval_metrics", "my_scores:length")([], [], []) == {"length": [1]}

    @pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json"])
    def test_metric_that_cannot_be_imported_is_refused_by_name(self, name):
        with pytest.raises(ValueError, match=name):
            import_object("eval_metrics", name)


class TestOutputs:
    @pytest.mark.parametrize(
        ("output", "trimmed"), [("a\n\nb###c", "a"), ("a###\n\nb", "a"), ("a b ", "a b "), ("###", "")]
    )
    def test_are_cut_at_the_first_stop_sequence(self, output, trimmed):
        assert trim(output, ["\n\n", "###"]) == trimmed

    def test_of_a_padded_batch_are_those_of_each_prompt_alone(self, model, tokenizer):
        network = AutoModelForCausalLM.from_pretrained(model)
        outputs = generate(network, tokenizer, PROMPTS, batch_size=3, max_new_tokens=8)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            config = GenerationConfig(max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
            alone = network.generate(ids, generation_config=config)[0, ids.shape[1] :]
            assert output == tokenizer.decode(alone, skip_special_tokens=True)

    def test_end_where_generation_meets_a_stop_sequence(self, model, tokenizer):
        network = AutoModelForCausalLM.from_pretrained(model)
        [free] = generate(network, tokenizer, PROMPTS[:1], batch_size=1, max_new_tokens=12)
        stop = free[3:5]
        [cut] = generate(network, tokenizer, PROMPTS[:1], batch_size=1, max_new_tokens=12, stop_sequences=[stop])
        assert cut == free[: free.index(stop)].rstrip()


def test_random_generators_are_left_as_they_were():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserved_random_state(seed=7):
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """The same run with generations, sampled at two temperatures, and without."""
    folder = tmp_path_factory.mktemp("runs")
    sampled = {"max_new_tokens": 6, "do_sample": True, "temperature": [0.5, 2.0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "with" / "tensorboard"))
        followed = train(model, folder / "with", sampled, report_to="tensorboard", activation_checkpointing=True)
    return followed, train(model, folder / "without", None, activation_checkpointing=True)


class TestTraining:
    def test_gives_the_same_weights_with_generations_and_without(self, runs, model):
        weights = [run.model.state_dict() for run in runs]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        first = AutoModelForCausalLM.from_pretrained(model).state_dict()
        assert not all(torch.equal(first[name], weights[0][name]) for name in first)

    def test_leaves_a_row_for_each_step_value_and_prompt(self, runs):
        rows = read_rows(Path(runs[0].args.output_dir) / "generations.jsonl")
        expected = [(step, value, prompt) for step in (1, 2) for value in (0.5, 2.0) for prompt in PROMPTS]
        assert [(row["step"], row["temperature"], row["prompt"]) for row in rows] == expected
        assert all(row["letters"] == len(row["output"]) for row in rows)

    def test_logs_the_means_of_each_value_of_the_sweep(self, runs):
        rows = read_rows(Path(runs[0].args.output_dir) / "generations.jsonl")
        logged = {log["step"]: log for log in runs[0].state.log_history if "eval_letters_temperature_2.0" in log}
        for step in (1, 2):
            values = [row["letters"] for row in rows if row["step"] == step and row["temperature"] == 2.0]
            assert logged[step]["eval_letters_temperature_2.0"] == sum(values) / 3

    def test_sends_a_table_to_the_tracker(self, runs):
        folder = f"{runs[0].args.output_dir}/tensorboard"
        events = EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
        tables = events.Tensors("generations/text_summary")
        assert [table.step for table in tables] == [1, 2]
        assert b"| step | prompt | output | temperature | letters |" in tables[0].tensor_proto.string_val[0]

    def test_can_choose_its_best_checkpoint_by_a_metric(self, model, tmp_path):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_letters", "greater_is_better": True}
        trainer = train(model, tmp_path, {"max_new_tokens": 6}, save_strategy="steps", save_steps=1, **best)
        means = {log["step"]: log["eval_letters"] for log in trainer.state.log_history if "eval_letters" in log}
        assert trainer.state.best_metric == max(means.values())
        assert means[trainer.state.best_global_step] == max(means.values())
