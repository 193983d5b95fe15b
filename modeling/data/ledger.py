"""The shards of an unfinished tokenized corpus: committed one by one, read while more are made.

    units/<key>.arrow     a shard, by the key of its unit (`modeling.data.units`)
    units/<key>.json      its receipt, written after it, with a digest over both. Without it nothing
                          counts
    stream.jsonl          first line: dtype, vocab_size, eos_id, and the policy that keys depend on.
                          Then a line for each shard, in the order of its split; a shard is told
                          when all before it are committed. Last of each: {"complete": "train"}

A retry digests the shards that have receipts, names and makes again what is damaged, and goes on.
Units are committed in any order, by several workers at once. Whoever wants to read tokens while
they are made calls `committed`, again and again: what it has returned once never changes.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modeling import canonical
from modeling.artifacts import needing_space, write_durably
from modeling.data.encoding import EncodedUnit
from modeling.data.shards import write_shard
from modeling.data.token_files import Shard
from modeling.inventory import DamagedArtifactError, file_sha256

STREAM_FILE = "stream.jsonl"
_UNITS = "units"
_RECEIPT = "shard_receipt/1"


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is known of a split of an unfinished tokenized corpus."""

    shards: tuple[Shard, ...]
    """In the order of the split, their files relative to the directory of progress."""
    complete: bool
    """Whether no shard will follow."""
    dtype: str
    vocab_size: int
    eos_id: int


FetchEarlier = Callable[[str, Path], Shard | None]
"""Puts the shard with a key at a path where nothing is, as another build has published it, and
returns its receipt; None if there is no such shard."""


def nothing_earlier(key: str, target: Path) -> Shard | None:
    """Knows of no other build."""
    return None


def committed(progress: Path, split: str) -> Stream | None:
    """Returns the shards of `split` that may be read by now; None before the build has begun.

    The files disappear when the artifact is published; what is mapped by then stays readable.
    """
    with contextlib.suppress(FileNotFoundError):
        lines = (progress / STREAM_FILE).read_bytes().split(b"\n")[:-1]  # the last may be half
        if lines:
            try:
                header, *rest = map(json.loads, lines)
                shards = [_shard(line) for line in rest if line.get("split") == split]
            except (ValueError, TypeError, AttributeError) as error:
                raise DamagedArtifactError(
                    f"{progress / STREAM_FILE}: damaged ({error}). Run again: it is written anew."
                ) from error
            complete = any(line.get("complete") == split for line in rest)
            return Stream(
                tuple(shards), complete, header["dtype"], header["vocab_size"], header["eos_id"]
            )
    return None


class Ledger:
    """Commits shards and finds them again."""

    def __init__(
        self,
        progress: Path,
        header: Mapping[str, Any],
        fetch_earlier: FetchEarlier,
        say: Callable[[str], None],
    ) -> None:
        """Opens what an earlier attempt has left in `progress`.

        Args:
            header: the first line of the stream; progress of another header is started anew.
            fetch_earlier: looks for shards that are not in `progress`.
            say: is told of damaged shards.
        """
        self._progress = progress
        self._fetch_earlier = fetch_earlier
        self._say = say
        self._shards: dict[str, Shard] = {}
        self.from_earlier: set[str] = set()
        """Keys of the units that were taken from other builds."""
        self.from_progress: set[str] = set()
        """Keys of the units that an earlier attempt of this build had committed."""
        (progress / _UNITS).mkdir(parents=True, exist_ok=True)
        self._told = self._open_stream(header)

    def find(self, key: str) -> Shard | None:
        """Returns the shard of a unit if it is there, with every byte checked once."""
        if key not in self._shards:
            if (shard := self._left_by_an_attempt(key)) is not None:
                self.from_progress.add(key)
            elif (shard := self._made_by_another_build(key)) is not None:
                self.from_earlier.add(key)
            else:
                return None
            self._shards[key] = shard
        return self._shards[key]

    def has(self, key: str) -> bool:
        """Whether a unit was found or committed by this build."""
        return key in self._shards

    def path(self, key: str) -> Path:
        """Returns where the shard of a unit is."""
        return self._progress / _UNITS / f"{key}.arrow"

    def commit(self, key: str, unit: EncodedUnit) -> Shard:
        """Writes a shard, and its receipt after it, so that both survive a crash or none counts.

        Raises:
            DiskFullError: there is no space for it.
        """
        attempt, encoded = self._attempt(key), unit.encoded
        with needing_space(f"a shard of {len(encoded.tokens):,} tokens", self._progress):
            try:
                write_shard(attempt, encoded.tokens, encoded.lengths, encoded.loss_mask)
                shard = Shard(
                    file=self._name(key),
                    documents=len(encoded.lengths),
                    tokens=len(encoded.tokens),
                    text_bytes=unit.text_bytes,
                    sha256=file_sha256(attempt),
                    key=key,
                    skipped=unit.skipped,
                    first_skipped=unit.first_skipped,
                )
                attempt.replace(self.path(key))
                self._write_receipt(shard)
            finally:
                for left in (self._progress / _UNITS).glob(f".{key}*"):
                    left.unlink()
        self._shards[key] = shard
        return shard

    def tell(self, split: str, index: int, key: str) -> Shard:
        """Puts the next shard of a split on the stream, for those who read it while it is made."""
        shard = self._shards[key]
        line = {"split": split} | shard.plain()
        told = self._told.setdefault(split, [])
        if index < len(told):
            if told[index] != shard:
                raise DamagedArtifactError(
                    f"{self._progress / STREAM_FILE}: shard {index} of {split} is {shard.key[:12]} "
                    f"now, an earlier attempt had {told[index].key[:12]}. Delete "
                    f"{self._progress} and run again."
                )
            return shard
        self._append(line)
        told.append(shard)
        return shard

    def complete(self, split: str) -> None:
        """Says on the stream that no shard of a split will follow."""
        self._append({"complete": split})

    def _open_stream(self, header: Mapping[str, Any]) -> dict[str, list[Shard]]:
        path = self._progress / STREAM_FILE
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        told: dict[str, list[Shard]] = {}
        try:
            found = [json.loads(line) for line in lines]
            kept = [line for line in found[1:] if "split" in line]
            for line in kept:
                told.setdefault(line["split"], []).append(_shard(line))
        except (ValueError, TypeError) as error:
            self._say(f"{path}: damaged ({error}); it is written again.")
            found, kept, told = [], [], {}
        if found[:1] != [dict(header)]:
            path.unlink(missing_ok=True)
            self._append(header)
            return {}
        whole = b"".join(_line(line) for line in [header, *kept])
        with path.open("r+b") as stream:  # without half a line, or markers of completion
            stream.truncate(len(whole))
        return told

    def _append(self, value: Mapping[str, Any]) -> None:
        with (
            needing_space("a line", self._progress),
            (self._progress / STREAM_FILE).open("ab") as stream,
        ):
            stream.write(_line(value))
            stream.flush()
            os.fsync(stream.fileno())

    def _left_by_an_attempt(self, key: str) -> Shard | None:
        path, receipt = self.path(key), self._receipt(key)
        if not receipt.exists():
            return None
        try:
            written = json.loads(receipt.read_bytes())
            if not isinstance(written, dict):
                raise TypeError(f"a {type(written).__name__}")
            digest = written.pop("receipt", None)
            if digest != canonical.digest(_RECEIPT, written):
                raise ValueError("it is not what was written")
            shard = Shard.of(written)
            found = file_sha256(path) if path.exists() else "missing"
        except (ValueError, TypeError) as error:
            found, shard = f"unreadable: {error}", None
        if shard is not None and found == shard.sha256:
            return shard
        self._say(
            f"{path}: damaged since it was committed ({_difference(found, shard)}); "
            f"it is made again."
        )
        receipt.unlink()
        path.unlink(missing_ok=True)
        return None

    def _made_by_another_build(self, key: str) -> Shard | None:
        attempt = self._attempt(key)
        attempt.unlink(missing_ok=True)
        try:
            shard = self._fetch_earlier(key, attempt)
        except FileNotFoundError as error:
            self._say(f"{error.filename} of an earlier tokenized corpus is missing.")
            return None
        if shard is None:
            return None
        if (found := file_sha256(attempt)) != shard.sha256:
            self._say(
                f"{shard.file} of an earlier tokenized corpus: damaged "
                f"({_difference(found, shard)}); its documents are encoded again."
            )
            attempt.unlink()
            return None
        shard = dataclasses.replace(shard, file=self._name(key))
        attempt.replace(self.path(key))
        self._write_receipt(shard)
        return shard

    def _write_receipt(self, shard: Shard) -> None:
        digest = canonical.digest(_RECEIPT, shard.plain())
        write_durably(self._receipt(shard.key), {"receipt": digest} | shard.plain())

    def _name(self, key: str) -> str:
        return f"{_UNITS}/{key}.arrow"

    def _attempt(self, key: str) -> Path:
        return self._progress / _UNITS / f".{key}.arrow"

    def _receipt(self, key: str) -> Path:
        return self._progress / _UNITS / f"{key}.json"


def _shard(line: Mapping[str, Any]) -> Shard:
    return Shard.of({name: value for name, value in line.items() if name != "split"})


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _difference(found: str, expected: Shard | None) -> str:
    if expected is None:
        return f"its receipt is {found}"
    return f"SHA-256 {found[:12]}, its receipt says {expected.sha256[:12]}"
