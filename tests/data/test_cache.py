"""The cache of tokens: what is not what was written is made anew."""

import random
from pathlib import Path

import datasets
from datasets import Dataset

from tunebook.data.layouts import choose_layout
from tunebook.data.loading import process
from tunebook.data.rendering import RenderSettings


def test_cached_tokens_that_are_damaged_are_made_anew_with_one_line(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = Dataset.from_dict({"prompt": [f"what is {i}? " for i in range(50)], "completion": ["five"] * 50})
    settings = RenderSettings("sft", tokenizer, None, choose_layout("sft", ["prompt", "completion"], {}))
    whole = process(rows, settings)[0].to_dict()
    [file] = (Path(tmp_path) / "tunebook").glob("*.arrow")
    content, draw = file.read_bytes(), random.Random(0)
    damaged = [b"", content[:-8], content[: len(content) // 2], bytes(len(content)), b"junk" * 99]
    for _ in range(10):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    for other in damaged:
        caplog.clear()
        file.unlink()
        file.write_bytes(other)
        assert process(rows, settings)[0].to_dict() == whole
        assert [record.getMessage() for record in caplog.records if "made anew" in record.getMessage()]
