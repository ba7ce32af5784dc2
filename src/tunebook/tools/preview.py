"""Show rows as the model sees them: which tokens are trained, which are only read, which were cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path

from datasets import Dataset
from jinja2 import Template
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ..data import load_recipe_data
from ..data.rendering import Renderer
from ..data.tokens import TOKEN_COLUMNS, process_batch
from ..files import read_yaml, terminal
from ..packing.batches import pack_like_training
from ..recipe import Recipe
from ..recipe.configs import SFTConfig

PAGE, STYLES = Path(__file__).with_name("preview.html"), Path(__file__).with_name("marks.yaml")
MARKS = read_yaml(STYLES.read_text(encoding="utf-8"), STYLES.name)
TRAINED, CONTEXT, CUT = "trained", "context", "cut"
ROWS_PER_PACK = 64  # rows that are packed for each packed row that is shown


@dataclass(frozen=True)
class Token:
    """A token of a row. `marks`: trained, context or cut, then which of special, shared and document it is besides."""

    id: int
    text: str
    marks: list[str]


Tokens = Mapping[str, list[int]]  # the columns of a row
Row = dict[str, list[Token]]  # SFT: row; preference pairs: chosen, rejected


def preview_rows(recipe: Recipe, count: int) -> tuple[list[Row], str]:
    """Return about `count` of the rows that the trainer gets, drawn with the seed, and what became of all rows.

    Packed SFT rows are packed by TRL's function, but from `ROWS_PER_PACK` x count rows and not from all.

    Raises:
        RecipeError: see [`load_recipe_data`].
    """
    args = recipe.training
    packs = isinstance(args, SFTConfig) and args.packing
    tokenizer, data = load_recipe_data(recipe, sample=count * (ROWS_PER_PACK if packs else 1))
    train, report = data.train, str(data.counts["train"])
    if isinstance(args, SFTConfig) and args.packing:
        train = pack_like_training(train, args)
        report += f"; packed into {len(train):,}"
    uncut = [
        row
        for source, settings in data.sources
        if settings.max_length is not None
        for row in Dataset.from_dict(process_batch(source.rows[:], Renderer(replace(settings, max_length=None))))
    ]
    columns = TOKEN_COLUMNS[recipe.task]
    shown = train.select(range(0, len(train), max(1, len(train) // count))[:count])
    return [show_row(row, before_the_cut(row, uncut, columns), tokenizer) for row in shown], report


def before_the_cut(row: Tokens, uncut: Iterable[Tokens], columns: Sequence[str]) -> Tokens:
    """Return the shortest row that begins with this one, or a packed row of several documents itself."""
    wholes = (whole for whole in uncut if all(whole[name][: len(row[name])] == row[name] for name in columns))
    return min(wholes, key=lambda whole: sum(len(whole[name]) for name in columns), default=row)


def show_row(row: Tokens, whole: Tokens, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return the tokens of each sequence of a row; behind them stand those of the uncut row that were cut off."""
    columns = {"row": "input_ids"} if "labels" in row else {side: f"{side}_ids" for side in ("chosen", "rejected")}
    prompt = row.get("prompt_ids", [])
    sequences = {name: prompt + row[column] for name, column in columns.items()}
    shared = len(commonprefix(list(sequences.values()))) if len(sequences) > 1 else 0
    starts = set(accumulate(row.get("seq_lengths", [])))
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown: Row = {}
    for name, ids in sequences.items():
        if "labels" in row:
            kinds = [CONTEXT if label == -100 else TRAINED for label in row["labels"]]
        else:  # DPO trains the answer; a reward is read at the last token
            start = len(prompt) if "prompt_ids" in row else len(ids) - 1
            kinds = [CONTEXT] * start + [TRAINED] * (len(ids) - start)
        cut = (prompt + whole[columns[name]])[len(ids) :]
        stream, shown[name] = DecodeStream(skip_special_tokens=False), []
        for i, (id, kind) in enumerate(zip(ids + cut, kinds + [CUT] * len(cut), strict=True)):
            text = stream.step(tokenizer.backend_tokenizer, id) or ""  # a character may be whole only in a later token
            others = {"special": id in special, "shared": i < shared, "document": i in starts}
            shown[name].append(Token(id, text, [kind, *(mark for mark, holds in others.items() if holds)]))
    return shown


def visible(text: str) -> str:
    """Return text with its control characters shown; a line break is ↵ and breaks the line too."""
    shown = {"\n": "↵\n", "\t": "⇥\t", "": "◌"}
    return shown.get(text) or "".join(shown.get(c, c if c.isprintable() else repr(c).strip("'")) for c in text)


def counts(tokens: Sequence[Token]) -> str:
    kinds, documents = [token.marks[0] for token in tokens], 1 + sum("document" in token.marks for token in tokens)
    parts = [f"{len(kinds) - kinds.count(CUT):,} tokens", f"{kinds.count(TRAINED):,} trained"]
    parts += [f"{kinds.count(CUT):,} cut"] * (CUT in kinds)
    parts += [f"{documents:,} documents"] * (documents > 1)
    return ", ".join(parts)


def print_rows(rows: Sequence[Row], report: str, console: Console) -> None:
    """Show rows in a terminal, each as a table with a column per side."""
    for number, row in enumerate(rows, start=1):
        table = Table(*(f"{number}. {name}: {counts(tokens)}" for name, tokens in row.items()), expand=True)
        table.add_row(*(terminal_text(tokens) for tokens in row.values()))
        console.print(table)
    for name, mark in MARKS.items():
        console.print(Text.assemble((name, mark["style"]), f" {mark['meaning']}"))
    console.print(terminal(report), highlight=False)


def terminal_text(tokens: Iterable[Token]) -> Text:
    text = Text()
    for token in tokens:
        text.append("¶" * ("document" in token.marks), MARKS["document"]["style"])
        text.append(visible(token.text), " ".join(MARKS[name]["style"] for name in token.marks if name != "document"))
    return text


def html_page(rows: Sequence[Row], report: str, title: str) -> str:
    """Return a page that loads nothing else; all text is escaped."""
    template = Template(PAGE.read_text(encoding="utf-8"), autoescape=True)
    return template.render(rows=rows, report=report, title=title, marks=MARKS, counts=counts, visible=visible)
