"""Generations on a few prompts at every evaluation, scored by the user's functions.

A metric is a function `metric(samples, prompts, outputs) -> {name: [a value for each output]}` of three lists of
strings, as in trlx. A sample is what the model read, followed by its output.
"""

import os
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import BaseModel, TypeAdapter
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from trl.models.utils import unwrap_model_for_generation

from ..checkpoints import optional
from ..data.files import read_files
from ..data.layouts import Layout, template_columns
from ..data.rendering import Renderer, RenderSettings
from ..data.turns import Dropped, MessageMapping
from ..errors import foreign, user_errors
from ..files import append_rows
from ..packing.context_parallel import TRLTrainer
from ..recipe.configs import CausalLMConfig, RunConfig, ScriptArguments
from .scores import Metrics
from .trackers import log_at_step, log_table


class Generation(BaseModel, extra="allow"):
    """A line of `generations.jsonl`: also the sweep's setting and the metrics' values."""

    step: int
    prompt: str
    output: str


Prompt = str | list[dict[str, Any]]  # a text, or a conversation's messages
Metric = Callable[[list[str], list[str], list[str]], dict[str, list[float]]]
TABLE = "generations"
T = TypeVar("T")
R = TypeVar("R")
GENERATION = TypeAdapter(Generation)


def load_prompts(eval_prompts: Sequence[str], columns: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts that a recipe names.

    Args:
        eval_prompts: the prompts themselves; or one entry, a file (.txt: a prompt per line; .jsonl: `prompt` or
            `messages` per line) or `column:NAME`.
        columns: those of the evaluation data before it is tokenized, e.g. a Dataset.

    Raises:
        ValueError: the file or the column does not exist, or there is no prompt.
    """
    name = eval_prompts[0] if len(eval_prompts) == 1 else ""
    if name.startswith("column:"):
        column = name.removeprefix("column:")
        try:
            prompts = list(columns[column])
        except KeyError:
            raise ValueError(f"`eval_prompts`: the evaluation data has no column {column}.") from None
    elif name.endswith((".txt", ".jsonl")):
        if not Path(name).is_file():
            raise ValueError(f"`eval_prompts`: there is no file {name}.")
        rows = list(read_files([Path(name)]))
        found = [row.get("text") or row.get("messages") or row.get("prompt") for row in rows]
        prompts = [prompt for prompt in found if prompt and not (isinstance(prompt, str) and prompt.isspace())]
    else:
        prompts = list(eval_prompts)
    if not prompts:
        raise ValueError(f"`eval_prompts`: {name or eval_prompts} holds no prompt.")
    return prompts


def import_object(key: str, name: str) -> Callable[..., Any]:
    """Import a function or class `package.module:name`, also from the working directory.

    Raises:
        ValueError: it cannot be imported or called; names the recipe's `key`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"`{key}`: {name} cannot be imported as module:name ({error!r}).") from error
    if not callable(found):
        raise ValueError(f"`{key}`: {name} is not a function or class.")
    return found


def sweep(generation_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `{key: value}` for each value of the key that has a list of them; `[{}]` where none has.

    Raises:
        ValueError: more than one value is a list.
    """
    keys = [key for key, value in generation_kwargs.items() if isinstance(value, list)]
    if len(keys) > 1:
        raise ValueError(f"`eval_generation_kwargs`: only one key may have a list of values, not {', '.join(keys)}.")
    return [{keys[0]: value} for value in generation_kwargs[keys[0]]] if keys else [{}]


def render_prompts(prompts: Sequence[Prompt], renderer: Renderer) -> list[str]:
    """Return what the model reads, rendered like training rows; see [`Renderer.question`].

    Raises:
        ValueError: a prompt cannot be rendered (which one, and why).
    """
    texts: list[str] = []
    for number, prompt in enumerate(prompts):
        try:
            texts.append(renderer.question(prompt))
        except Dropped as dropped:
            raise ValueError(f"`eval_prompts`: prompt {number} cannot be read: {dropped}.") from dropped
    return texts


def render_settings(trainer: TRLTrainer, script: ScriptArguments) -> RenderSettings:
    """Return how the recipe renders prompts and completions."""
    template = script.prompt_template
    if template is not None and any(name for name, _ in template_columns(template)):
        template = None  # it makes a prompt of the columns of a training row
    layout = Layout("prompt and completion", {"prompt": "prompt", "completion": "completion"}, template)
    given = {key: vars(script)[key] for key in ("system_prompt", "apply_chat_template")}
    mapping = MessageMapping(**(script.message_mapping or {}))
    return RenderSettings("sft", trainer.processing_class, None, layout, mapping, **given)


def trim(output: str, stop_sequences: Sequence[str]) -> str:
    """Return the output up to the first stop sequence in it, without the white space that this leaves at its end."""
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
    **generation_kwargs: Any,  # noqa: ANN401 - what the user gives to generate()
) -> list[str]:
    """Return the model's continuation of each text, without special tokens, trimmed at the stop sequences."""
    if stop_sequences:  # they end generate(), which leaves them, and may leave more, in the output
        generation_kwargs |= {"stop_strings": list(stop_sequences), "tokenizer": tokenizer}
    padded = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": add_special_tokens}
    outputs: list[str] = []
    generator = cast(GenerationMixin, model)
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(list(texts[start : start + batch_size]), **padded).to(model.device)
        tokens = generator.generate(**batch, pad_token_id=tokenizer.pad_token_id, use_cache=True, **generation_kwargs)
        outputs += tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [trim(output, stop_sequences) for output in outputs]


def map_over_ranks(accelerator: Accelerator, function: Callable[[list[T]], list[R]], items: Sequence[T]) -> list[R]:
    """Return `function(items)` on every rank, each rank computing its share.

    All ranks compute equally many items, some of them twice, as the forward passes of a sharded model are collective.
    """
    with accelerator.split_between_processes(list(range(len(items))), apply_padding=True) as share:
        results = function([items[index] for index in share])
    gathered = dict(gather_object(list(zip(share, results, strict=True))))
    return [gathered[index] for index in range(len(items))]


@contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seed inside, and leave the generators of Python, NumPy and torch (CPU and this process's GPU) as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class GenerationCallback(TrainerCallback):
    """Generates from a few prompts at every evaluation, once per step and split across ranks, and scores the outputs.

    Means are logged, and added to the evaluation's metrics, as eval_<name>, or eval_<name>_<key>_<value> for each value
    of a sweep. Outputs are logged as a table and to `generations.jsonl`. Training is the same with and without them.
    """

    def __init__(self, trainer: TRLTrainer, script: ScriptArguments, prompts: Sequence[Prompt]):
        self.args, self.trainer = cast(CausalLMConfig, trainer.args), trainer
        self.texts = render_prompts(prompts, Renderer(render_settings(trainer, script)))
        self.prompts = [p if isinstance(p, str) else text for p, text in zip(prompts, self.texts, strict=True)]
        self.has_special_tokens = bool(script.apply_chat_template) or not isinstance(prompts[0], str)
        self.metrics: list[Metric] = [import_object("eval_metrics", name) for name in self.args.eval_metrics]
        self.generation_kwargs = self.args.eval_generation_kwargs or {}
        self.step: int | None = None

    @staticmethod
    def validate(args: CausalLMConfig) -> None:
        """Raise a ValueError for a metric that cannot be imported, and an argument that `generate` does not have."""
        generation_kwargs = args.eval_generation_kwargs or {}
        swept = sweep(generation_kwargs)
        if unknown := set(generation_kwargs) - set(GenerationConfig().to_dict()):
            raise ValueError(f"`eval_generation_kwargs`: GenerationConfig has no {', '.join(sorted(unknown))}.")
        with foreign("`eval_generation_kwargs`", "cannot be used"):
            for one in swept:
                GenerationConfig().update(**generation_kwargs | one)
        for name in args.eval_metrics:
            import_object("eval_metrics", name)

    def on_evaluate(self, args: RunConfig, state: TrainerState, control: object, metrics: Metrics, **_: object) -> None:  # type: ignore[override]
        if state.global_step == self.step:  # of several evaluation sets, the first
            return
        self.step = state.global_step
        means: Metrics = {}
        rows: list[dict[str, Any]] = []
        with preserved_random_state(args.seed):
            for swept in sweep(self.generation_kwargs):
                outputs = map_over_ranks(self.trainer.accelerator, partial(self._generate, swept), self.texts)
                # A metric may draw or ask a judge: all ranks must see one value
                [values] = broadcast_object_list([self._score(outputs) if state.is_world_process_zero else None])
                suffix = "".join(f"_{key}_{value}" for key, value in swept.items())
                means |= {f"eval_{name}{suffix}": sum(column) / len(column) for name, column in values.items()}
                columns = {"step": state.global_step, "prompt": self.prompts, "output": outputs, **swept, **values}
                rows += cast(list[dict[str, Any]], pd.DataFrame(columns).to_dict("records"))
        metrics |= means
        if state.is_world_process_zero:
            with optional(f"{TABLE}.jsonl"):
                append_rows(Path(args.output_dir) / f"{TABLE}.jsonl", rows, "step", kind=GENERATION)
            log_table(self.trainer, TABLE, rows)
            if means:
                log_at_step(self.trainer, means, state.global_step)

    def _score(self, outputs: list[str]) -> dict[str, list[float]]:
        samples = [text + output for text, output in zip(self.texts, outputs, strict=True)]
        values = {}
        for metric in self.metrics:
            for name, column in metric(samples, self.prompts, outputs).items():
                if len(column) != len(outputs):
                    raise ValueError(f"`eval_metrics`: {name} has {len(column)} values for {len(outputs)} outputs.")
                values[name] = [float(value) for value in column]
        return values

    def _generate(self, swept: dict[str, Any], texts: list[str]) -> list[str]:
        trainer, args = self.trainer, self.args
        options: dict[str, Any] = {"batch_size": args.per_device_eval_batch_size, "stop_sequences": args.stop_sequences}
        options |= {"add_special_tokens": not self.has_special_tokens, **self.generation_kwargs, **swept}
        checkpointing = cast(dict[str, Any] | None, args.activation_checkpointing_kwargs)
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
            ) as model,
            trainer.accelerator.autocast(),  # as the forward of training; parts of a model may differ in dtype
            user_errors(),
        ):
            return generate(model, trainer.processing_class, texts, **options)
