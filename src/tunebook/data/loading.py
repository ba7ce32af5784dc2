"""The rows of a run, tokenized once: read, split, tokenized, mixed, counted, cached.

They leave as TRL's processed columns, which the trainers take as they are. SFT: `input_ids`, `labels`; reward models:
`chosen_ids`, `rejected_ids` (`margin`, `subset`); DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`. What was cut or
dropped, and why, goes to the log and to data_report.json.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError
from ..recipe import Recipe
from ..recipe.configs import DatasetConfig
from .rendering import RenderSettings
from .sources import Source, Sources, all_keys, first, list_entries, read_sources
from .tokenizer import load_recipe_tokenizer, settle_template
from .tokens import CUT, KEPT, process_batch, token_features

logger = logging.getLogger(__name__)


class NothingToTrain(RecipeError):
    """No row of a data set is left."""


@dataclass
class RowCounts:
    """What became of the rows of one split.

    Attributes:
        dropped: reason -> rows, and the first of them (counted from 0).
    """

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, outcomes: pa.StringArray) -> "RowCounts":
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(outcomes).to_pylist()}
        dropped = {
            reason: {"rows": rows, "first_row": pc.index(outcomes, reason).as_py()}
            for reason, rows in counts.items()
            if reason not in (KEPT, CUT)
        }
        return cls(len(outcomes), counts.get(KEPT, 0) + counts.get(CUT, 0), counts.get(CUT, 0), dropped)

    def __add__(self, other: "RowCounts") -> "RowCounts":
        dropped = {reason: dict(entry) for reason, entry in self.dropped.items()}
        for reason, entry in other.dropped.items():
            seen = dropped.setdefault(reason, {"rows": 0, "first_row": entry["first_row"]})
            seen["rows"] += entry["rows"]
        return RowCounts(self.read + other.read, self.kept + other.kept, self.cut + other.cut, dropped)

    def __str__(self) -> str:
        reasons = "".join(
            f"; {entry['rows']:,} dropped: {reason} (first: row {entry['first_row']:,})"
            for reason, entry in self.dropped.items()
        )
        return f"{self.kept:,} of {self.read:,} rows kept, {self.cut:,} of them cut{reasons}"


def process(
    dataset: Dataset, settings: RenderSettings, num_proc: int | None = None, name: str = ""
) -> tuple[Dataset, RowCounts]:
    """Tokenize a data set in batches, from the cache where the same rows were tokenized in the same way before.

    All ranks share the cache: rank 0 writes it, the others read it.

    Raises:
        NothingToTrain: when no row is left.
    """
    fingerprint = settings.fingerprint(dataset)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tunebook"
    folder.mkdir(parents=True, exist_ok=True)
    with PartialState().main_process_first():
        tokens = dataset.map(
            process_batch,
            batched=True,
            fn_kwargs={"settings": settings},
            remove_columns=dataset.column_names,
            features=token_features(settings),
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            desc=f"Tokenizing {name}",
        )
    outcomes = tokens.data.column("outcome").combine_chunks()
    counts = RowCounts.of(outcomes)
    logger.log(logging.WARNING if counts.dropped else logging.INFO, "%s: %s", name, counts)
    if not counts.kept:
        raise NothingToTrain(f"No row of {name} can be trained on: {counts}.")
    if counts.dropped:
        tokens = tokens.select(np.flatnonzero(pc.is_in(outcomes, pa.array([KEPT, CUT])).to_numpy(zero_copy_only=False)))
    return tokens.remove_columns("outcome"), counts


@dataclass
class Data:
    """The rows of a run as its trainer takes them.

    Attributes:
        sources: the training sources as they were read, each with how it was tokenized.
        share: as of [`Sources`].
        raw_eval: as of [`Sources`].
    """

    train: Dataset
    eval: Dataset | None
    counts: dict[str, RowCounts]
    raw_eval: Dataset | None = None
    sources: list[tuple[Source, RenderSettings]] = field(default_factory=list)
    share: float = 1.0

    def write_report(self, path: Path) -> None:
        path.write_text(json.dumps({split: vars(counts) for split, counts in self.counts.items()}, indent=2) + "\n")


def load_recipe_data(recipe: Recipe, sample: int | None = None) -> tuple[PreTrainedTokenizerBase, Data]:
    """Load a recipe's tokenizer and rows: the tokenizer first, its template once it is known whether a row has turns.

    Args:
        sample: see [`read_sources`].

    Raises:
        RecipeError: see [`load_tokenizer`], [`read_sources`] and [`load_data`].
    """
    tokenizer = load_recipe_tokenizer(recipe)
    sources = read_sources(recipe, sample)
    settle_template(tokenizer, bool(recipe.script.apply_chat_template) or sources.have_turns)
    return tokenizer, load_data(recipe, sources, tokenizer)


def load_data(recipe: Recipe, sources: Sources, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Tokenize what was read, and mix the training sources.

    Raises:
        RecipeError: for a key that has no effect on any training source; see [`process`].
    """
    script, args = recipe.script, recipe.training
    refuse_idle_keys(recipe, sources.train)
    settings = [render_settings(recipe, source, tokenizer) for source in sources.train]
    tokens, counts = tokenize_sources(sources.train, settings, args.dataset_num_proc, "train")
    train = first(mix(tokens, list_entries(recipe), script.mixture_stopping, args.seed), script.max_train_samples)
    train = train.remove_columns([name for name in train.column_names if name == "subset"])
    data = Data(train, None, {"train": counts}, sources.raw_eval, list(zip(sources.train, settings, strict=True)))
    data.share = sources.share
    if sources.eval:
        settings = [render_settings(recipe, source, tokenizer) for source in sources.eval]
        tokens, data.counts["eval"] = tokenize_sources(sources.eval, settings, args.dataset_num_proc, "eval")
        data.eval = first(datasets.concatenate_datasets(tokens), script.max_eval_samples)
        if "subset" in data.eval.column_names:
            data.eval = data.eval.class_encode_column("subset")
    return data


def tokenize_sources(
    sources: Sequence[Source], settings: Sequence[RenderSettings], num_proc: int | None, split: str
) -> tuple[list[Dataset], RowCounts]:
    """Tokenize each source; return its tokens, and the counts of all."""
    tokens, total = [], RowCounts()
    for source, of_source in zip(sources, settings, strict=True):
        dataset, counts = process(source.rows, of_source, num_proc, f"{source.name} ({split})")
        tokens.append(dataset)
        total += counts
    return tokens, total


def render_settings(recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase) -> RenderSettings:
    """Return how the rows of a source become tokens."""
    given, args = all_keys(recipe), recipe.training
    splits_long_rows = recipe.task == "sft" and args.packing and args.packing_strategy in ("bfd_split", "wrapped")
    if recipe.task == "rm" and not args.use_margin and "margin" in source.rows.column_names:
        logger.warning("%s has a column margin that is not used. Set use_margin: true to use it.", source.name)
    max_length = None if splits_long_rows else args.max_length
    keys = {f.name: given[f.name] for f in fields(RenderSettings) if f.name in given and f.name != "max_length"}
    return RenderSettings(recipe.task, tokenizer, max_length, source.columns, **keys)


def refuse_idle_keys(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Refuse a key that does nothing to the rows of any source.

    Raises:
        RecipeError: naming the key, and the rows that it needs.
    """
    given = all_keys(recipe)
    idle = [idle_keys(given, source) for source in sources]
    if common := set(idle[0]).intersection(*idle):
        name = min(common)
        raise RecipeError(f"`{name}` has no effect on these rows ({sources[0].name}). It needs {idle[0][name]}.")


def idle_keys(given: Mapping[str, Any], source: Source) -> dict[str, str]:
    """Return the keys that do nothing to rows of this layout -> what they need."""
    columns, templated = source.columns, given["apply_chat_template"] or source.has_turns
    conversations = "conversations, or apply_chat_template: true"
    needs = {
        "assistant_only_loss": ("text" not in columns, "conversations, or prompts and completions"),
        "last_turn_only_loss": ("messages" in columns, "whole conversations (messages_column)"),
        "completion_only_loss": ("completion" in columns, "prompts and completions"),
        "prompt_template": (columns.get("prompt") is not None, "a column of plain prompts"),
        "system_prompt": (templated, conversations),
        "chat_template": (templated, conversations),
        "chat_template_path": (templated, conversations),
    }
    return {name: need for name, (live, need) in needs.items() if given.get(name) and not live}


# ---- Mixtures ------------------------------------------------------------------------------------------------------


def mix(parts: Sequence[Dataset], sources: Sequence[DatasetConfig], stopping: str, seed: int) -> Dataset:
    """Sources into one: drawn by probability, or in shares (`fraction`, TRL's meaning: the shares of a mixture that is
    as large as it can be without using a row twice), or all rows of all."""
    if len(parts) == 1:
        return parts[0]
    if sources[0].probability is not None:
        total = sum(source.probability for source in sources)
        return datasets.interleave_datasets(
            list(parts), [source.probability / total for source in sources], seed=seed, stopping_strategy=stopping
        )
    if sources[0].fraction is not None:
        shares = [source.fraction / sum(source.fraction for source in sources) for source in sources]
        size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        parts = [
            part.shuffle(seed=seed).select(range(round(size * share)))
            for part, share in zip(parts, shares, strict=True)
        ]
    return datasets.concatenate_datasets(list(parts))


def fingerprint(dataset: Dataset) -> str:
    """Hash of the rows themselves, in order: the same for the same rows out of another file."""
    digest = xxhash.xxh64()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in table.columns:
            column = column.combine_chunks()  # num_proc writes others
            values = column.flatten() if pa.types.is_list(column.type) else column
            digest.update(np.diff(column.offsets).tobytes() if pa.types.is_list(column.type) else b"")
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
