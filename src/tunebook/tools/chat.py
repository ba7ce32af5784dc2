"""Talk with a model, trained or not, whole or an adapter."""

import logging
from collections.abc import Iterator
from typing import cast

import torch
from peft import TaskType
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from ..data.tokenizer import end_of_turn_ids
from ..errors import RecipeError, foreign
from ..training.models import base_of, check_model, find_adapter, put_adapter

logger = logging.getLogger(__name__)


def load_chat_model(name: str, revision: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, or an adapter on its base model, onto the GPU if there is one.

    Raises:
        RecipeError: it cannot be loaded, or is a reward model.
    """
    architectures = check_model(name, revision, False, key="MODEL").architectures or ()
    with foreign(name):
        adapter = find_adapter(name, revision)
    rewards = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    if rewards or (adapter is not None and adapter.task_type == TaskType.SEQ_CLS):
        raise RecipeError(f"{name} is a reward model. Run tunebook score, or name a model that writes text.")
    with foreign(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        base, base_revision = (name, revision) if adapter is None else base_of(adapter)
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, revision=base_revision))
        if adapter is not None:
            model = cast(PreTrainedModel, put_adapter(model, name, revision))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model.to(device)  # type: ignore[arg-type] # transformers' wrapper hides that it takes a device
    return model.eval(), tokenizer


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, **options: object) -> str:
    """Write the continuation of a text to the terminal as it is generated, and return it."""
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None).to(model.device)
    ends = end_of_turn_ids(tokenizer, model.generation_config.eos_token_id)
    options |= {"eos_token_id": ends or None, "pad_token_id": tokenizer.pad_token_id or next(iter(ends), None)}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = cast(GenerationMixin, model).generate(**inputs, streamer=streamer, **options)
    return cast(str, tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def read_turns(prompt: str | None) -> Iterator[str]:
    """Yield what the user says: the one prompt, or each line until the input ends."""
    if prompt is not None:
        yield prompt
        return
    console = Console(stderr=True)
    while True:
        try:
            line = console.input("> " if console.is_terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line


def chat(name: str, prompt: str | None, system: str | None, revision: str, **options: object) -> None:
    """Answer a prompt, or a conversation that is typed line by line. A model without a chat template continues each.

    Args:
        options: for `generate`, over the model's generation config.

    Raises:
        RecipeError: the model cannot be loaded, or its template does not take the conversation.
    """
    model, tokenizer = load_chat_model(name, revision)
    turns = [] if system is None else [{"role": "system", "content": system}]
    if tokenizer.chat_template is None:
        logger.warning("%s has no chat template: it continues each text, and does not answer.", name)
        if system is not None:
            raise RecipeError(f"--system: {name} has no chat template, which would say where it stands. Leave it out.")
    for said in read_turns(prompt):
        text = said
        if tokenizer.chat_template is not None:
            turns.append({"role": "user", "content": said})
            with foreign(f"The chat template of {name}", "does not take this conversation"):
                text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        output = answer(model, tokenizer, text, **options)
        turns.append({"role": "assistant", "content": output})
