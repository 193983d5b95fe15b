"""The files of a tokenized corpus, for all who read it: Arrow shards and a manifest of them.

    <split>-00000.arrow   one row a document, see `modeling.data.shards`
    manifest.json         dtype, vocab_size, eos_id, and for each split its shards, its counts, and
                          the Merkle leaves of its flat tokens (see `modeling.merkle`)

Who only reads tokens loads nothing of what made them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling.data.shards import FlatTokens, map_shard

MANIFEST_FILE = "manifest.json"
FORMAT = "tokenized_corpus/2"


@dataclass(frozen=True)
class Shard:
    """One file of consecutive documents of a split."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    sha256: str
    """Of the file as written."""
    key: str
    """Of the unit that the file holds, tokenizer and policy included."""
    skipped: int = 0
    """Documents of the unit that have no ids, and were left out for it."""
    first_skipped: tuple[tuple[int, str], ...] = ()
    """The place in the unit of some of them, and what is wrong: a unit that has the same texts
    under other names has the same shard."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Shard":
        """Returns what `plain` has written."""
        values = dict(raw)
        first_skipped = tuple((place, told) for place, told in values.pop("first_skipped", ()))
        return cls(first_skipped=first_skipped, **values)

    def plain(self) -> dict[str, Any]:
        """Returns all of it; what was left out, only if anything was."""
        values = asdict(self) | {"first_skipped": [list(pair) for pair in self.first_skipped]}
        if not self.skipped:
            del values["skipped"], values["first_skipped"]
        return values


@dataclass(frozen=True)
class SplitManifest:
    """What is known of one split without reading its shards."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]
    token_leaves: tuple[str, ...]
    tokens_root: str
    offsets_root: str
    loss_mask_root: str | None
    """None where every token is to be predicted."""
    longest_document: int
    """In tokens."""
    document_lengths: tuple[int, ...]
    """How many documents have fewer than 2, then 2 to 3, 4 to 7, 8 to 15... tokens."""
    unknown_tokens: int | None
    """How often the id that stands for unknown text occurs; None if the tokenizer has none."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`."""

    dtype: str
    vocab_size: int
    eos_id: int
    has_loss_mask: bool
    splits: dict[str, SplitManifest]

    @property
    def shares(self) -> dict[str, int]:
        """The bytes of text of each source to train on, where there are several."""
        train = {name: split for name, split in self.splits.items() if name.startswith("train/")}
        return {name: split.text_bytes for name, split in train.items()} if len(train) > 1 else {}

    def plain(self) -> dict[str, Any]:
        """Returns what stands in the file."""
        splits = {
            name: asdict(split) | {"shards": [shard.plain() for shard in split.shards]}
            for name, split in self.splits.items()
        }
        return {"format": FORMAT} | asdict(self) | {"splits": splits}

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads the manifest of a built tokenized corpus."""
        raw = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise ValueError(f"{directory / MANIFEST_FILE}: not of format {FORMAT}.")
        splits = {
            name: SplitManifest(
                **split
                | {
                    "shards": tuple(Shard.of(shard) for shard in split["shards"]),
                    "token_leaves": tuple(split["token_leaves"]),
                    "document_lengths": tuple(split["document_lengths"]),
                }
            )
            for name, split in raw.pop("splits").items()
        }
        return cls(splits=splits, **raw)


def flat_tokens(directory: Path, split: SplitManifest, dtype: np.dtype) -> FlatTokens:
    """Returns the tokens of one split of a built tokenized corpus, mapped into memory."""
    has_loss_mask = split.loss_mask_root is not None
    shards = (
        map_shard(directory / shard.file, dtype, with_loss_mask=has_loss_mask)
        for shard in split.shards
    )
    return FlatTokens([shard.tokens for shard in shards])
