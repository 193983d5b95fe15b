"""A token cache that is still being written: training draws from it while documents are tokenized.

    <handoff>/demand.json     written here: rows of each split that training waits for or has read
    <handoff>/finished.json   written by whoever tokenizes: where the whole tokenized corpus is

Rows are those that the finished cache will have, since a row is the tokens at its place in the
stream. Those of a shard can be drawn as soon as the shard is committed; asking for more waits, and
says for how long. Where the corpus is complete, so is this.

What was there to be read is on record with each checkpoint (`modeling.data.evidence`).
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from modeling.artifacts import write_durably
from modeling.data import evidence
from modeling.data.ledger import committed
from modeling.data.order import EVERY_ROW
from modeling.data.rows import TOKENS_ALONE, Columns, Rows
from modeling.data.shards import FlatTokens, Ids, map_shard
from modeling.data.tokenized import Manifest, flat_tokens
from modeling.merkle import MerkleHasher

DEMAND_FILE = "demand.json"
FINISHED_FILE = "finished.json"
_POLL_S = 0.05
_FIRST_TOLD_S, _TOLD_EVERY_S = 1.0, 10.0


class WaitingEndedError(RuntimeError):
    """A wait for rows was ended, because nobody wants them any more."""


class GrowingCache:
    """Rows of a tokenized corpus in the making."""

    def __init__(
        self,
        progress: Path,
        handoff: Path,
        splits: tuple[str, ...],
        *,
        sequence_length: int,
        vocab_size: int,
        dtype: np.dtype,
        report: Callable[[str], None],
    ) -> None:
        """Draws rows from the shards that a tokenization commits.

        Args:
            progress: where it commits them.
            handoff: a directory shared with whoever tokenizes.
            splits: names of the splits to read.
            sequence_length: tokens of a row.
            vocab_size: ids are below it.
            dtype: of ids in the shards.
            report: hears what is waited for.
        """
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.splits = splits
        self.columns: Columns = TOKENS_ALONE
        self._progress = progress
        self._handoff = handoff
        self._report = report
        self._streams = {split: _Stream(dtype) for split in splits}
        self._demand = dict.fromkeys(splits, 0)
        self._finished = False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        write_durably(handoff / DEMAND_FILE, self._demand)

    def known_rows(self, split: str, wanted: int) -> int:
        """Returns how many rows a split has: at least `wanted`, or all; waits until that is known.

        Raises:
            WaitingEndedError: `stop_waiting` was called meanwhile.
        """
        if self._finished or wanted <= min(self._written(split), self._demand[split]):
            return self._written(split)
        with self._lock:
            if wanted > self._demand[split]:
                self._demand[split] = wanted
                write_durably(self._handoff / DEMAND_FILE, self._demand)
            self._wait(split, wanted)
            return self._written(split)

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has in the end; waits until it is complete."""
        return self.known_rows(split, EVERY_ROW)

    def rows(self, split: str, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`, all of which must be known."""
        num_rows = self._written(split)
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(
                f"rows {indices.min()} to {indices.max()} were asked of split `{split}`, of which "
                f"{num_rows} rows are written."
            )
        starts = indices.astype(np.int64) * self.sequence_length
        return Rows(self._streams[split].tokens.gather(starts, self.sequence_length))

    def stop_waiting(self) -> None:
        """Ends the wait of any other thread."""
        self._ended.set()

    def evidence(self) -> dict[str, Any]:
        """Returns the length of a row, and of each split the rows read so far and their root."""
        splits = {
            split: stream.evidence(self.sequence_length) for split, stream in self._streams.items()
        }
        return {"sequence_length": self.sequence_length, "splits": splits}

    def refusal(self, seen: Mapping[str, Any]) -> str | None:
        """Returns why work with this evidence was done on other rows; None if on these.

        Waits until as many rows are there.
        """
        for split, part in seen.get("splits", {}).items():
            if split in self.splits:
                self.known_rows(split, part["rows"])
        counts = {split: self._written(split) for split in self.splits}
        return evidence.refusal(seen, counts, self._stored_rows, self.sequence_length)

    def _stored_rows(self, split: str, indices: np.ndarray) -> np.ndarray:
        return self.rows(split, indices).tokens.astype(self._streams[split].dtype)

    def _written(self, split: str) -> int:
        return len(self._streams[split].tokens) // self.sequence_length

    def _wait(self, split: str, wanted: int) -> None:
        began, had = time.monotonic(), self._written(split)
        told = began + _FIRST_TOLD_S - _TOLD_EVERY_S
        while (rows := self._written(split)) < wanted and not self._finished:
            self._refresh()
            if self._finished or self._written(split) >= wanted:
                return
            now = time.monotonic()
            if now - told >= _TOLD_EVERY_S:
                told = now
                self._report(_waiting(split, rows, wanted, (rows - had) / (now - began)))
            if self._ended.wait(_POLL_S):
                raise WaitingEndedError(
                    f"{wanted:,} rows of split `{split}` were waited for; {rows:,} are written."
                )

    def _refresh(self) -> None:
        """Maps what has been committed since; all of it once the corpus is finished."""
        finished = self._handoff / FINISHED_FILE
        if finished.exists():
            self._finish(Path(json.loads(finished.read_text(encoding="utf-8"))["tokenized_corpus"]))
            return
        for split, stream in self._streams.items():
            known = committed(self._progress, split)
            for shard in known.shards[stream.num_shards :] if known else ():
                try:
                    stream.append(map_shard(self._progress / shard.file, stream.dtype).tokens)
                except FileNotFoundError:
                    # Published, and therefore moved: `finished.json` is about to say where to.
                    return

    def _finish(self, tokenized_dir: Path) -> None:
        """Takes the tokens that lack from the finished corpus, however it is cut into shards."""
        manifest = Manifest.read(tokenized_dir)
        for split, stream in self._streams.items():
            whole = flat_tokens(tokenized_dir, manifest.splits[split], stream.dtype)
            if len(stream.tokens) < len(whole):
                stream.append(whole.span(len(stream.tokens), len(whole)))
            if stream.root() != manifest.splits[split].tokens_root:
                raise ValueError(
                    f"{tokenized_dir}: split `{split}` does not begin with the tokens that were "
                    f"committed to {self._progress} while training read them. Run again: "
                    f"training goes on from what it can prove, or begins anew."
                )
        self._finished = True


class _Stream:
    """The tokens of one split as far as they are known, digested as they come."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._parts: list[Ids] = [np.empty(0, dtype)]
        self._hasher = MerkleHasher()
        self._lock = threading.Lock()
        self.tokens = FlatTokens(self._parts)

    @property
    def num_shards(self) -> int:
        return len(self._parts) - 1

    def append(self, tokens: Ids) -> None:
        with self._lock:
            self._parts.append(tokens)
            self._hasher.update(tokens.data.cast("B"))
            self.tokens = FlatTokens(self._parts)

    def root(self) -> str:
        return self._hasher.root()

    def evidence(self, sequence_length: int) -> dict[str, Any]:
        with self._lock:
            rows = len(self.tokens) // sequence_length
            return evidence.of_rows(self._hasher.leaves, self.tokens, rows, sequence_length)


def _waiting(split: str, rows: int, wanted: int, rate: float) -> str:
    if wanted > rows + 10**15:
        return f"training waits for the last row of split `{split}`: {rows:,} so far."
    left = f"; {(wanted - rows) / rate:,.0f} s to go" if rate > 0 else ""
    return (
        f"training waits for rows: {rows:,} of {wanted:,} of split `{split}` are tokenized, "
        f"{rate:,.0f} rows/s{left}."
    )
