"""What the model says: generations on a few prompts at every evaluation, scored by the user's functions.

A metric is a function `metric(samples, prompts, outputs) -> {name: [a value for each output]}`, trlx's signature, of
three lists of strings: a sample is what the model read followed by its output.
"""

import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl.models.utils import unwrap_model_for_generation

from ..files import append_rows
from ..recipe.configs import CausalLMConfig, ScriptArguments
from .trackers import log_at_step, log_table

Prompt = str | list[dict]  # a text, or a conversation's messages
Metric = Callable[[list[str], list[str], list[str]], dict[str, list[float]]]
TABLE = "generations"


def load_prompts(eval_prompts: Sequence[str], columns: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """The prompts that a recipe names.

    Args:
        eval_prompts: the prompts themselves; or one entry, a file (.txt: a prompt a line; .jsonl: `prompt` or
            `messages` a line) or `column:NAME`.
        columns: of the evaluation data, before it is tokenized; a Dataset is one.

    Raises:
        ValueError: the file or the column does not exist, or there is no prompt.
    """
    name = eval_prompts[0] if len(eval_prompts) == 1 else ""
    if name.startswith("column:"):
        column = name.removeprefix("column:")
        try:
            prompts = list(columns[column])
        except KeyError:
            raise ValueError(f"eval_prompts: the evaluation data has no column {column}") from None
    elif name.endswith((".txt", ".jsonl")):
        if not Path(name).is_file():
            raise ValueError(f"eval_prompts: there is no file {name}")
        prompts = [line for line in Path(name).read_text().splitlines() if line.strip()]
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in prompts]
            prompts = [row["messages"] if "messages" in row else row["prompt"] for row in rows]
    else:
        prompts = list(eval_prompts)
    if not prompts:
        raise ValueError(f"eval_prompts: {name or eval_prompts} holds no prompt")
    return prompts


def import_object(key: str, name: str) -> Any:
    """Import `package.module:object`, also from the working directory.

    Raises:
        ValueError: it cannot be imported; names the recipe's `key`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        return vars(importlib.import_module(module))[attribute]
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(f"`{key}`: {name} cannot be imported as module:name ({error!r}).") from error


def load_metric(name: str) -> Metric:
    """Import a metric.

    Raises:
        ValueError: it cannot be imported, or is not a function.
    """
    metric = import_object("eval_metrics", name)
    if not callable(metric):
        raise ValueError(f"`eval_metrics`: {name} is not a function.")
    return metric


def sweep(generation_kwargs: Mapping) -> tuple[str | None, list[dict]]:
    """The key whose value is a list, if any, and the keyword arguments of `generate` for each of its values.

    Raises:
        ValueError: more than one value is a list.
    """
    keys = [key for key, value in generation_kwargs.items() if isinstance(value, list)]
    if len(keys) > 1:
        raise ValueError(f"eval_generation_kwargs: only one key may have a list of values, not {', '.join(keys)}")
    if not keys:
        return None, [dict(generation_kwargs)]
    return keys[0], [{**generation_kwargs, keys[0]: value} for value in generation_kwargs[keys[0]]]


def render_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    system_prompt: str | None = None,
    prompt_template: str | None = None,
) -> list[str]:
    """What the model reads: conversations by the chat template, up to the assistant's turn; texts too, as a user's
    turn, if `chat`. An assistant's last turn in a conversation is what is asked for, and is left out. Texts stand in
    the place of {} in `prompt_template`."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = prompt if prompt_template is None else prompt_template.replace("{}", prompt)
            if not chat:
                texts.append(prompt)
                continue
            prompt = [{"role": "user", "content": prompt}]
        messages = prompt if prompt[0]["role"] == "system" else system + prompt
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return texts


def trim(output: str, stop_sequences: Sequence[str]) -> str:
    """The output up to the first stop sequence in it, without the white space that this leaves at its end."""
    ends = [output.find(stop) for stop in stop_sequences if stop in output]
    return output[: min(ends)].rstrip() if ends else output


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    add_special_tokens: bool = True,
    stop_sequences: Sequence[str] = (),
    **generation_kwargs,
) -> list[str]:
    """The model's continuation of each text, without special tokens, trimmed at the stop sequences."""
    if stop_sequences:  # generate() must not run on; it leaves the stop sequence, and may leave more, in the output
        generation_kwargs |= {"stop_strings": list(stop_sequences), "tokenizer": tokenizer}
    outputs = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=add_special_tokens,
        ).to(model.device)
        with torch.no_grad():
            tokens = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, use_cache=True, **generation_kwargs)
        completions = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        outputs += [trim(completion, stop_sequences) for completion in completions]
    return outputs


def map_over_ranks(accelerator: Accelerator, function: Callable[[list], list], items: Sequence) -> list:
    """`function(items)`, each rank computing its share; every rank gets all results, in order.

    All ranks get equally many items (some twice), as the forward passes of a sharded model are collective.
    """
    with accelerator.split_between_processes(list(range(len(items))), apply_padding=True) as share:
        results = function([items[index] for index in share])
    gathered = dict(gather_object(list(zip(share, results, strict=True))))
    return [gathered[index] for index in range(len(items))]


@contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seed within, and leave the generators of Python, NumPy and torch (CPU and this process's GPU) as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def score_outputs(
    metrics: Sequence[Metric], texts: list[str], prompts: list[str], outputs: list[str]
) -> dict[str, list[float]]:
    """The values of all metrics, by name.

    Raises:
        ValueError: a metric did not give one value for each output.
    """
    samples = [text + output for text, output in zip(texts, outputs, strict=True)]
    values: dict[str, list[float]] = {}
    for metric in metrics:
        for name, column in metric(samples, prompts, outputs).items():
            if len(column) != len(outputs):
                raise ValueError(f"eval_metrics: {name} has {len(column)} values for {len(outputs)} outputs")
            values[name] = [float(value) for value in column]
    return values


class GenerationCallback(TrainerCallback):
    """Generates from a few prompts at every evaluation, once a step, and scores what comes.

    Each rank generates its share. Means go to the trackers and the evaluation's metrics as eval_<name>, or
    eval_<name>_<key>_<value> for each value of a sweep; outputs to the trackers as a table and to `generations.jsonl`.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        *,
        generation_kwargs: dict,
        metrics: Sequence[Metric] = (),
        stop_sequences: Sequence[str] = (),
        chat: bool = False,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
    ):
        self.trainer, self.metrics, self.stop_sequences = trainer, metrics, stop_sequences
        self.texts = render_prompts(prompts, trainer.processing_class, chat, system_prompt, prompt_template)
        self.prompts = [p if isinstance(p, str) else text for p, text in zip(prompts, self.texts, strict=True)]
        self.has_special_tokens = chat or not isinstance(prompts[0], str)
        self.sweep_key, self.settings = sweep(generation_kwargs)
        self.step: int | None = None

    @classmethod
    def validate(cls, args: CausalLMConfig) -> None:
        """Refuse metrics that cannot be imported, and keyword arguments that `generate` does not have.

        Raises:
            ValueError: naming the key.
        """
        sweep(args.eval_generation_kwargs or {})
        if unknown := set(args.eval_generation_kwargs or {}) - set(GenerationConfig().to_dict()):
            raise ValueError(f"`eval_generation_kwargs`: GenerationConfig has no {', '.join(sorted(unknown))}.")
        for name in args.eval_metrics:
            load_metric(name)

    @classmethod
    def from_args(cls, trainer: Trainer, script: ScriptArguments, prompts: Sequence[Prompt]) -> "GenerationCallback":
        return cls(
            trainer,
            prompts,
            generation_kwargs=trainer.args.eval_generation_kwargs or {},
            metrics=list(map(load_metric, trainer.args.eval_metrics)),
            stop_sequences=trainer.args.stop_sequences,
            chat=bool(script.apply_chat_template),
            system_prompt=script.system_prompt,
            prompt_template=script.prompt_template,
        )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step == self.step:  # of several evaluation sets, the first
            return
        self.step = state.global_step
        means: dict[str, float] = {}
        rows: list[dict] = []
        with preserved_random_state(args.seed):
            for setting in self.settings:
                outputs = map_over_ranks(self.trainer.accelerator, partial(self._generate, setting), self.texts)
                values = None
                if state.is_world_process_zero:  # a metric may draw or ask a judge: all ranks must see one value
                    values = score_outputs(self.metrics, self.texts, self.prompts, outputs)
                [values] = broadcast_object_list([values])
                swept = {self.sweep_key: setting[self.sweep_key]} if self.sweep_key else {}
                suffix = "".join(f"_{key}_{value}" for key, value in swept.items())
                means |= {f"eval_{name}{suffix}": sum(column) / len(column) for name, column in values.items()}
                for index, (prompt, output) in enumerate(zip(self.prompts, outputs, strict=True)):
                    scores = {name: column[index] for name, column in values.items()}
                    rows.append({"step": state.global_step, "prompt": prompt, "output": output, **swept, **scores})
        metrics |= means
        if state.is_world_process_zero:
            append_rows(Path(args.output_dir) / f"{TABLE}.jsonl", rows)
            log_table(self.trainer, TABLE, rows)
            if means:
                log_at_step(self.trainer, means, state.global_step)

    def _generate(self, generation_kwargs: dict, texts: list[str]) -> list[str]:
        trainer = self.trainer
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.activation_checkpointing_kwargs,
        ) as model:
            return generate(
                model,
                trainer.processing_class,
                texts,
                batch_size=trainer.args.per_device_eval_batch_size,
                add_special_tokens=not self.has_special_tokens,
                stop_sequences=self.stop_sequences,
                **generation_kwargs,
            )
