"""The examples of `docs/data.md`: its datasets are valid, its code runs on a real cache."""

import re
from pathlib import Path

import pytest

from modeling.experiment import load_dataset

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", [b for b in blocks("yaml") if not b.startswith("trainer:")])
def test_each_dataset_of_the_page_is_valid(text, tmp_path):
    (tmp_path / "example.yaml").write_text(text)
    assert load_dataset(tmp_path / "example.yaml").sequence_lengths


@pytest.mark.parametrize("code", blocks("python"))
def test_each_piece_of_code_on_the_page_runs(code, chain):
    places = {"cache_dir": chain.cache_dir, "tokenized_dir": chain.tokenized_dir, "eos_id": 0}
    places["tokenization_dir"] = chain.tokenized_dir.parent / "progress"
    exec(compile(code, str(PAGE), "exec"), places)


def test_every_format_is_on_the_page():
    from modeling.data import formats

    assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in formats._READERS)
