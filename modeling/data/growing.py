"""A token cache that is still being written: training draws from it while documents are tokenized.

    <handoff>/demand-<process>.json   written here: rows of each split that this process waits for
                                      or has read, and the split that it waits for now, if any
    <handoff>/finished.json           written by whoever tokenizes: where the whole corpus is

Rows are those that the finished cache will have: cut from the stream, a row is the tokens at its
place there; packed, it is known when the documents of its window are (`modeling.data.packing`).
Those of a shard can be drawn as soon as the shard is committed; asking for more waits, and says for
how long. Where the corpus is complete, so is this.

What was there to be read is on record with each checkpoint (`modeling.data.evidence`).
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from modeling.artifacts import write_durably
from modeling.data import evidence
from modeling.data.cache import StoredRows
from modeling.data.config import TokenCacheConfig
from modeling.data.ledger import committed
from modeling.data.order import EVERY_ROW
from modeling.data.packing import Documents, PackedRows, Packer, Window
from modeling.data.rows import Columns, Rows
from modeling.data.shards import FlatTokens, MappedShard, map_shard, token_dtype
from modeling.data.token_files import Manifest, SplitManifest

FINISHED_FILE = "finished.json"
_DEMAND_FILE = "demand-{}.json"
_POLL_S = 0.05
_FIRST_TOLD_S, _TOLD_EVERY_S = 1.0, 10.0
_COMPARED_AT_ONCE = 1 << 24


class WaitingEndedError(RuntimeError):
    """A wait for rows was ended, because nobody wants them any more."""


class Demand(NamedTuple):
    """What all processes of a training want."""

    rows: dict[str, int]
    """That are asked for or read, by split."""
    waited_for: tuple[str, ...]
    """Splits without rows of which one of them cannot go on."""

    @classmethod
    def read(cls, handoff: Path) -> "Demand":
        """Returns what is wanted now; nothing, before training has started."""
        rows: dict[str, int] = {}
        waited_for: dict[str, None] = {}
        for path in sorted(handoff.glob(_DEMAND_FILE.format("*"))):
            found = json.loads(path.read_text(encoding="utf-8"))
            for split, wanted in found["rows"].items():
                rows[split] = max(rows.get(split, 0), wanted)
            if found["waits_for"] is not None:
                waited_for[found["waits_for"]] = None
        return cls(rows, tuple(waited_for))


def clear(handoff: Path) -> None:
    """Forgets what an earlier attempt has left there."""
    for path in (handoff / FINISHED_FILE, *handoff.glob(_DEMAND_FILE.format("*"))):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Vocabulary:
    """What rows depend on beside the documents and how they are laid out."""

    size: int
    eos_id: int
    has_loss_mask: bool

    @property
    def dtype(self) -> np.dtype:
        """Of ids in the shards."""
        return token_dtype(self.size)


class GrowingCache:
    """Rows of a tokenized corpus in the making."""

    def __init__(
        self,
        progress: Path,
        handoff: Path,
        shares: Mapping[str, int],
        *,
        config: TokenCacheConfig,
        vocabulary: Vocabulary,
        report: Callable[[str], None],
    ) -> None:
        """Draws rows from the shards that a tokenization commits.

        Args:
            progress: where it commits them.
            handoff: a directory shared with whoever tokenizes.
            shares: the splits to read, and the bytes of text that each has.
            config: how tokens become rows.
            vocabulary: of the ids.
            report: hears what is waited for.
        """
        is_packed = config.packing == "documents"
        self.sequence_length = config.length
        self.vocab_size = vocabulary.size
        self.splits = tuple(shares)
        self.columns = Columns(is_packed, is_packed or vocabulary.has_loss_mask)
        self._vocabulary = vocabulary
        self._shares = dict(shares)
        self._progress = progress
        self._handoff = handoff
        self._report = report
        self._splits = {split: _Split(config, vocabulary) for split in shares}
        self._demand = dict.fromkeys(shares, 0)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._tell(None)

    def known_rows(self, split: str, wanted: int) -> int:
        """Returns how many rows a split has: at least `wanted`, or all; waits until that is known.

        Raises:
            WaitingEndedError: `stop_waiting` was called meanwhile.
        """
        grown = self._splits[split]
        if wanted <= self._demand[split] and grown.has(wanted):
            return grown.num_rows
        with self._lock:
            if wanted > self._demand[split]:
                self._demand[split] = wanted
                self._tell(None)
            if not grown.has(wanted):
                self._refresh()
            if not grown.has(wanted):
                self._tell(split)
                self._wait(split, wanted)
                self._tell(None)
            grown.prove(self._demand[split])
            return grown.num_rows

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has in the end; waits until it is complete."""
        return self.known_rows(split, EVERY_ROW)

    def share(self, split: str) -> int:
        """Returns how much of an epoch's beginning a split is, beside what others are."""
        return self._shares[split]

    def rows(self, split: str, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`, all of which must be known."""
        num_rows = self._splits[split].num_rows
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(
                f"rows {indices.min()} to {indices.max()} were asked of split `{split}`, of which "
                f"{num_rows} rows are written."
            )
        return self._splits[split].gather(indices)

    def stop_waiting(self) -> None:
        """Ends the wait of any other thread."""
        self._ended.set()

    def evidence(self) -> dict[str, Any]:
        """Returns the length of a row, and what proves which rows of each split were there."""
        splits = {split: grown.evidence() for split, grown in self._splits.items()}
        return {"sequence_length": self.sequence_length, "splits": splits}

    def refusal(self, seen: Mapping[str, Any]) -> str | None:
        """Returns why work with this evidence was done on other rows; None if on these.

        Waits until as many rows are there.
        """
        for split, part in seen.get("splits", {}).items():
            if split in self.splits:
                self.known_rows(split, part["rows"])
        return evidence.refusal(
            seen,
            {split: grown.num_rows for split, grown in self._splits.items()},
            self.rows,
            sequence_length=self.sequence_length,
            dtype=self._vocabulary.dtype,
        )

    def _tell(self, waits_for: str | None) -> None:
        demand = {"rows": self._demand, "waits_for": waits_for}
        write_durably(self._handoff / _DEMAND_FILE.format(os.getpid()), demand)

    def _wait(self, split: str, wanted: int) -> None:
        grown = self._splits[split]
        began, had = time.monotonic(), grown.num_rows
        told = began + _FIRST_TOLD_S - _TOLD_EVERY_S
        while not grown.has(wanted):
            now = time.monotonic()
            if now - told >= _TOLD_EVERY_S:
                told, rate = now, (grown.num_rows - had) / (now - began)
                self._report(_waiting(split, grown.num_rows, wanted, rate))
            if self._ended.wait(_POLL_S):
                raise WaitingEndedError(
                    f"{wanted:,} rows of split `{split}` were waited for; {grown.num_rows:,} are "
                    f"written."
                )
            self._refresh()

    def _refresh(self) -> None:
        """Maps what has been committed since; all of it once the corpus is finished."""
        finished = self._handoff / FINISHED_FILE
        if finished.exists():
            where = json.loads(finished.read_text(encoding="utf-8"))["tokenized_corpus"]
            manifest = Manifest.read(Path(where))
            for split, grown in self._splits.items():
                if not grown.is_whole:
                    grown.finish(Path(where), manifest.splits[split], split)
            return
        for split, grown in self._splits.items():
            known = committed(self._progress, split)
            if known is None or grown.is_whole:
                continue
            try:
                grown.append(
                    [self._progress / shard.file for shard in known.shards[grown.num_shards :]]
                )
            except FileNotFoundError:
                # Published, and therefore moved: `finished.json` is about to say where to.
                return
            if known.complete:
                grown.end()


class _Split:
    """One split as far as it is known: its shards, its rows, and what proves them."""

    def __init__(self, config: TokenCacheConfig, vocabulary: Vocabulary) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._shards: list[MappedShard] = []
        self._windows: list[Window] = []
        self._num_packed = 0
        self._proof = evidence.RowsProof(vocabulary.dtype)
        self._lock = threading.Lock()
        self.is_whole = False
        self._lay_out()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def has(self, wanted: int) -> bool:
        """Whether as many rows are known, or all that there will be."""
        return self.is_whole or self.num_rows >= wanted

    def append(self, paths: Sequence[Path]) -> None:
        """Takes in the next committed shards, all or none."""
        if paths:
            self._shards += [self._mapped(path) for path in paths]
            self._lay_out()

    def end(self) -> None:
        """Knows that no shard will follow."""
        self._lay_out(is_whole=True)
        self.is_whole = True

    def finish(self, directory: Path, split: SplitManifest, name: str) -> None:
        """Reads from the finished corpus from now on, however it is cut into shards.

        Raises:
            ValueError: it does not begin with what has been read.
        """
        whole = [self._mapped(directory / shard.file) for shard in split.shards]
        if not all(_begins_with(*streams) for streams in _streams(whole, self._shards)):
            raise ValueError(
                f"{directory}: split `{name}` does not begin with the documents that were "
                f"committed while training read them. Run again: training goes on from what it "
                f"can prove, or begins anew."
            )
        self._shards = whole
        self.end()

    def gather(self, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns rows by their numbers."""
        return self._rows.gather(indices)

    def prove(self, num_rows: int) -> None:
        """Takes in evidence the first rows, since from now on they may be read."""
        with self._lock:
            self._proof.take(self.gather, min(num_rows, self.num_rows))

    def evidence(self) -> dict[str, Any]:
        """Returns what proves which rows may have been read."""
        with self._lock:
            return self._proof.summary()

    def _mapped(self, path: Path) -> MappedShard:
        vocabulary = self._vocabulary
        return map_shard(path, vocabulary.dtype, with_loss_mask=vocabulary.has_loss_mask)

    def _lay_out(self, *, is_whole: bool = False) -> None:
        """Makes rows of what is there; those that were known stay as they are."""
        empty = np.empty(0, self._vocabulary.dtype)
        tokens = FlatTokens([empty, *(shard.tokens for shard in self._shards)])
        mask = None
        if self._vocabulary.has_loss_mask:
            masks = (shard.loss_mask for shard in self._shards if shard.loss_mask is not None)
            mask = FlatTokens([np.empty(0, np.uint8), *masks])
        if self._config.packing == "documents":
            self._rows = self._packed(tokens, mask, is_whole)
            self.num_rows = len(self._rows)
        else:
            self._rows = StoredRows(tokens, None, mask, self._config.length)
            self.num_rows = len(tokens) // self._config.length

    def _packed(self, tokens: FlatTokens, mask: FlatTokens | None, is_whole: bool) -> PackedRows:
        """Returns the rows of the windows that no further document can change."""
        length, long_documents = self._config.length, self._config.long_documents
        documents = Documents([shard.offsets for shard in self._shards])
        packer = Packer(length, long_documents)
        for first, stop in packer.windows(documents, self._num_packed):
            if stop < len(documents) or is_whole:
                pieces, _ = packer.pack(documents, first, stop)
                self._windows.append(Window.of(stop - first, pieces))
                self._num_packed = stop
        return PackedRows(
            self._windows,
            documents,
            tokens,
            mask,
            sequence_length=length,
            long_documents=long_documents,
            padding_id=self._vocabulary.eos_id,
        )


def _streams(
    whole: Sequence[MappedShard], read: Sequence[MappedShard]
) -> Iterator[tuple[FlatTokens, FlatTokens]]:
    """Yields what of the shards has to agree: tokens, lengths of documents, and loss masks."""

    def flat(part: Callable[[MappedShard], Any]) -> tuple[FlatTokens, FlatTokens]:
        found, expected = ([part(shard) for shard in shards] for shards in (whole, read))
        return FlatTokens([*found, np.empty(0, int)]), FlatTokens([*expected, np.empty(0, int)])

    yield flat(lambda shard: shard.tokens)
    yield flat(lambda shard: np.diff(shard.offsets))
    if any(shard.loss_mask is not None for shard in read):
        yield flat(lambda shard: shard.loss_mask)


def _begins_with(whole: FlatTokens, read: FlatTokens) -> bool:
    """Whether one stream begins with the other."""
    spans = (
        (at, min(at + _COMPARED_AT_ONCE, len(read)))
        for at in range(0, len(read), _COMPARED_AT_ONCE)
    )
    return len(whole) >= len(read) and all(
        np.array_equal(whole.span(*span), read.span(*span)) for span in spans
    )


def _waiting(split: str, rows: int, wanted: int, rate: float) -> str:
    if wanted > rows + 10**15:
        return f"training waits for the last row of split `{split}`: {rows:,} so far."
    left = f"; {(wanted - rows) / rate:,.0f} s to go" if rate > 0 else ""
    return (
        f"training waits for rows: {rows:,} of {wanted:,} of split `{split}` are tokenized, "
        f"{rate:,.0f} rows/s{left}."
    )
