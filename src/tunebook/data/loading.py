"""The rows of a run: read, tokenized once and cached, mixed, split, counted.

They leave as TRL's processed columns, which the trainers take as they are. SFT: `input_ids`, `labels`; reward models:
`chosen_ids`, `rejected_ids` (`margin`, `subset`); DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`. The log and
data_report.json say how many rows were cut or dropped, and why.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..checkpoints import checksums
from ..errors import RecipeError
from ..recipe import Recipe
from ..recipe.configs import SFTConfig
from .audit import remedy
from .rendering import Renderer, RenderSettings
from .sources import Source, Sources, all_keys, first, list_entries, read_sources
from .tokenizer import load_recipe_tokenizer, settle_template
from .tokens import CUT, KEPT, process_batch, token_features
from .turns import MessageMapping

logger = logging.getLogger(__name__)


class NothingToTrain(RecipeError):
    """No row of a data set is left."""


@dataclass
class Reason:
    """Why rows are dropped, or what is wrong with them."""

    rows: int
    first_row: int  # from 0
    example: str = ""  # what the first row shows

    def __str__(self) -> str:
        return f"first: row {self.first_row:,}{': ' * bool(self.example)}{self.example}"


@dataclass
class RowCounts:
    """What became of the rows of one split."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, Reason] = field(default_factory=dict)
    flawed: dict[str, Reason] = field(default_factory=dict)  # of rows that are kept, and not trained as they stand

    def add(self, outcomes: pa.Table) -> None:
        """Count the outcomes and notes of one more source."""
        outcome, note = (outcomes.column(name).combine_chunks() for name in ("outcome", "note"))
        kept = pc.is_in(outcome, pa.array([KEPT, CUT]))
        self.read += len(outcomes)
        self.kept += pc.sum(kept).as_py() or 0
        self.cut += pc.sum(pc.equal(outcome, CUT)).as_py() or 0
        for counts, reasons in (
            (self.dropped, pc.if_else(kept, None, outcome)),
            (self.flawed, pc.if_else(kept, note, None)),
        ):
            for reason, rows in (entry.values() for entry in pc.value_counts(reasons.drop_null()).to_pylist()):
                row = pc.index(reasons, reason).as_py()
                example = note[row].as_py() if counts is self.dropped else None
                counts.setdefault(reason, Reason(0, row, example or "")).rows += rows

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.read:,} rows kept, {self.cut:,} of them cut"]
        parts += [f"{entry.rows:,} dropped: {reason} ({entry})" for reason, entry in self.dropped.items()]
        parts += [f"{entry.rows:,} kept although {reason} ({entry})" for reason, entry in self.flawed.items()]
        return "; ".join(parts)


@dataclass(frozen=True)
class Data:
    """The rows of a run as its trainer takes them."""

    train: Dataset
    eval: Dataset | None
    counts: dict[str, RowCounts]  # of "train" and "eval"
    sources: list[tuple[Source, RenderSettings]]  # the training rows as they were read, and how they were tokenized
    share: float  # this and the next: see [`Sources`]
    raw_eval: Dataset | None

    def write_report(self, path: Path) -> None:
        path.write_text(json.dumps({split: asdict(counts) for split, counts in self.counts.items()}, indent=2) + "\n")


def load_recipe_data(recipe: Recipe, sample: int | None = None) -> tuple[PreTrainedTokenizerBase, Data]:
    """Load a recipe's tokenizer and rows, which decide whether a tokenizer without template needs one.

    Raises:
        RecipeError: see [`load_recipe_tokenizer`], [`read_sources`] (and for `sample`) and [`load_data`].
    """
    tokenizer = load_recipe_tokenizer(recipe)
    sources = read_sources(recipe, sample)
    has_turns = bool(recipe.script.apply_chat_template) or sources.have_turns
    settle_template(tokenizer, has_turns, needs_eos=not all_keys(recipe).get("pretraining"))
    return tokenizer, load_data(recipe, sources, tokenizer)


def load_data(recipe: Recipe, sources: Sources, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Tokenize what was read, with a tokenizer whose template is settled, and mix the training sources.

    Raises:
        RecipeError: for a key that has no effect on any training source; see [`process`].
    """
    refuse_idle_keys(recipe, sources.train)
    train, settings, train_counts = tokenize_sources(recipe, sources.train, tokenizer, "train")
    held_out, _, eval_counts = tokenize_sources(recipe, sources.eval, tokenizer, "eval")
    return Data(
        mix(recipe, train),
        join_evaluation(recipe, held_out),
        {"train": train_counts} | ({"eval": eval_counts} if sources.eval else {}),
        list(zip(sources.train, settings, strict=True)),
        sources.share,
        sources.raw_eval,
    )


def refuse_idle_keys(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Refuse a key that has no effect on the rows of any source."""
    given = all_keys(recipe)
    roles = {role for source in sources for role in source.layout.columns}
    has_turns = given["apply_chat_template"] or any(source.has_turns for source in sources)
    templated = (has_turns, "conversations, or apply_chat_template: true")
    needs = {
        "assistant_only_loss": (roles - {"text", "input_ids", "labels"}, "conversations, or prompts and completions"),
        "last_turn_only_loss": ("messages" in roles, "whole conversations (messages_column)"),
        "completion_only_loss": ("completion" in roles, "prompts and completions"),
        "prompt_template": (roles & {"prompt", "completion", "chosen"}, "a column of plain prompts"),
        "system_prompt": templated,
        "system_column": templated,
        "history_column": templated,
        "message_mapping": templated,
        "chat_template": templated,
        "chat_template_path": templated,
    }
    for name, (has_effect, need) in needs.items():
        if given.get(name) and not has_effect:
            raise RecipeError(f"`{name}` has no effect on these rows ({sources[0].name}). It needs {need}.")


def tokenize_sources(
    recipe: Recipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, split: str
) -> tuple[list[Dataset], list[RenderSettings], RowCounts]:
    """Return the tokens of each source, how each was tokenized, and the counts of all."""
    parts, settings, total = [], [], RowCounts()
    for source in sources:
        settings.append(render_settings(recipe, source, tokenizer, split))
        name = f"{source.name} ({split})"
        columns = ", ".join(f"{role}: {column}" for role, column in source.layout.columns.items())
        logger.info("%s is read as %s (%s).", name, source.layout.name, columns)
        if unused := source.layout.unused(source.rows.column_names):
            keys = (
                "`use_margin: true`" if unused == ["margin"] else "`system_column`, `history_column`, `prompt_template`"
            )
            message = "%s has columns that are not used: %s. Set what reads them (%s), or leave it if that is meant."
            logger.warning(message, name, ", ".join(unused), keys)
        tokens, outcomes = process(source.rows, settings[-1], recipe.training.dataset_num_proc, name)
        if trains_throughout(settings[-1]):
            warn_of_trained_questions(tokens, name)
        parts.append(tokens)
        total.add(outcomes)
    return parts, settings, total


def trains_throughout(settings: RenderSettings) -> bool:
    """Return whether whole conversations are trained, questions and all."""
    by_answers = settings.assistant_only_loss or settings.last_turn_only_loss
    return settings.task == "sft" and settings.layout.name == "conversations" and not by_answers


def warn_of_trained_questions(tokens: Dataset, name: str) -> None:
    labels = pc.list_flatten(first(tokens, 1000).with_format("arrow")["labels"][:])
    share = pc.mean(pc.not_equal(labels, -100)).as_py()
    message = "%s: all turns of the conversations are trained (%.0f%% of the tokens), the user's too. "
    logger.warning(message + "Set `assistant_only_loss: true` to train answers only.", name, 100 * share)


def render_settings(recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase, split: str) -> RenderSettings:
    """Return how the rows of a source become tokens."""
    given, args = all_keys(recipe), recipe.training
    keys = {f.name: given[f.name] for f in fields(RenderSettings) if f.name in given}
    keys["message_mapping"] = MessageMapping(**(given["message_mapping"] or {}))
    if isinstance(args, SFTConfig):
        packs = args.packing if split == "train" or args.eval_packing is None else args.eval_packing
        keys["splits"] = packs and args.packing_strategy in ("bfd_split", "wrapped")
    return RenderSettings(recipe.task, tokenizer, layout=source.layout, **keys)


def process(
    dataset: Dataset, settings: RenderSettings, num_proc: int | None = None, name: str = ""
) -> tuple[Dataset, pa.Table]:
    """Tokenize a data set in batches, or take it from the cache if the same rows were tokenized the same way before.

    All ranks share the cache: rank 0 writes it, the others read it.

    Returns:
        The tokens of the rows that can be trained on, and the outcome and note of every row.

    Raises:
        NothingToTrain: when no row can be trained on.
    """
    fingerprint = settings.fingerprint(dataset)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tunebook"
    folder.mkdir(parents=True, exist_ok=True)
    with PartialState().main_process_first(), verified_cache(folder, fingerprint, name):
        tokens = dataset.map(
            process_batch,
            batched=True,
            fn_kwargs={"renderer": Renderer(settings)},
            remove_columns=dataset.column_names,
            features=token_features(settings),
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            desc=f"Tokenizing {name}",
        )
    outcomes = tokens.data.table.select(["outcome", "note"])
    counts = RowCounts()
    counts.add(outcomes)
    logger.log(logging.WARNING if counts.dropped else logging.INFO, "%s: %s", name, counts)
    if not counts.kept:
        raise NothingToTrain(f"No row of {name} can be trained on: {counts}.")
    for flaw, reason in counts.flawed.items():
        if reason.rows > counts.kept / 100:
            message = "%s: %.0f%% of the rows are trained although %s (first: row %d). %s"
            logger.warning(message, name, 100 * reason.rows / counts.kept, flaw, reason.first_row, remedy(flaw))
    if counts.dropped:
        kept = pc.is_in(outcomes["outcome"], pa.array([KEPT, CUT]))
        tokens = tokens.select(np.flatnonzero(kept.to_numpy()))
    return tokens.remove_columns(["outcome", "note"]), outcomes


@contextmanager
def verified_cache(folder: Path, fingerprint: str, name: str) -> Iterator[None]:
    """Delete cached tokens that are not what was written, before they are read inside; note their checksums."""
    sums, cached = folder / f"{fingerprint}.json", cached_files(folder, fingerprint)
    if PartialState().is_main_process and cached:
        found = json.dumps(checksums(folder, cached))
        if not (sums.is_file() and sums.read_bytes() == found.encode()):
            logger.warning("The cached tokens of %s are not what was written. They are made anew.", name)
            for file in cached:
                (folder / file).unlink()
            cached = []
    yield
    if PartialState().is_main_process and (files := cached_files(folder, fingerprint)) != cached:
        sums.write_text(json.dumps(checksums(folder, files)))


def cached_files(folder: Path, fingerprint: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{fingerprint}*.arrow"))


def mix(recipe: Recipe, parts: list[Dataset]) -> Dataset:
    """Make one data set of the training sources, drawn by probability or in shares, or with all rows of all.

    `fraction` has TRL's meaning: the shares of a mixture that is as large as it can be without repeating a row.
    """
    seed, sources = recipe.training.seed, list_entries(recipe)
    if len(parts) > 1 and sources[0].fraction is not None:
        fractions = [source.fraction or 0.0 for source in sources]
        shares = [fraction / sum(fractions) for fraction in fractions]
        size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        parts = [first(part.shuffle(seed=seed), round(size * share)) for part, share in zip(parts, shares, strict=True)]
    if len(parts) > 1 and sources[0].probability is not None:
        chances = [source.probability or 0.0 for source in sources]
        probabilities = [chance / sum(chances) for chance in chances]
        stopping = recipe.script.mixture_stopping
        mixed = datasets.interleave_datasets(parts, probabilities, seed=seed, stopping_strategy=stopping)
    else:
        mixed = datasets.concatenate_datasets(parts)
    mixed = first(mixed, recipe.script.max_train_samples)
    return mixed.remove_columns("subset") if "subset" in mixed.column_names else mixed


def join_evaluation(recipe: Recipe, parts: list[Dataset]) -> Dataset | None:
    """Make one data set of what was read for evaluation; None if nothing was."""
    if not parts:
        return None
    joined = first(datasets.concatenate_datasets(parts), recipe.script.max_eval_samples)
    return joined.class_encode_column("subset") if "subset" in joined.column_names else joined


def fingerprint(dataset: Dataset) -> str:
    """Return a hash of the rows themselves, in their order: the same if they come from a different file."""
    digest = xxhash.xxh64()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in table.columns:
            column = column.combine_chunks()  # num_proc leaves several chunks
            if pa.types.is_list(column.type):
                digest.update(np.diff(column.offsets).tobytes())
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
