"""The shards of an unfinished tokenized corpus: committed one by one, read while more are made.

    units/<key>.arrow     a shard, by the key of its unit (`modeling.data.units`)
    units/<key>.json      its receipt, written after it, with a digest over both. Without it nothing
                          counts
    stream.jsonl          first line: dtype, vocab_size, eos_id, and the policy that keys depend on.
                          Then a line for each shard, in the order of its split; a shard is told
                          when all before it are committed. Last of each: {"complete": "train"}

A retry digests the shards that have receipts, names and makes again what is damaged, and goes on.
Where the store is remote, its `work` has `units` too, receipts last, for another machine to go on.
They are sent while more are encoded, and published by a copy within the store.
Units are committed in any order, by several workers at once. Whoever wants to read tokens while
they are made calls `committed`, again and again: what it has returned once never changes.
"""

import contextlib
import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from modeling import canonical
from modeling.artifacts import needing_space, write_durably
from modeling.data.encoding import EncodedUnit
from modeling.data.shards import write_shard
from modeling.data.token_files import Shard
from modeling.inventory import DamagedArtifactError, file_sha256
from modeling.notes import json_bytes

STREAM_FILE = "stream.jsonl"
_UNITS = "units"
_SENDERS = 2
_MOST_UNDER_WAY = 8
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


class SharedUnits:
    """The committed units of a build on an object store, where other machines find them."""

    def __init__(self, url: str) -> None:
        """Lists what is at `url`, the progress of a build that nobody else works on meanwhile."""
        filesystem, root = fsspec.url_to_fs(f"{url.rstrip('/')}/{_UNITS}", use_listings_cache=False)
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")
        names = (str(path).rpartition("/")[2] for path in filesystem.glob(f"{self._root}/*.json"))
        self._keys = {name.removesuffix(".json") for name in names}
        self._whole: set[str] = set()
        self._senders: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def __contains__(self, key: str) -> bool:
        """Whether a unit is there or on its way, as far as its receipt says."""
        return key in self._keys

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Lets units be sent by threads of their own meanwhile; ends when all have arrived.

        Raises:
            OSError: what kept one from arriving, if nothing else is raised before.
        """
        with ThreadPoolExecutor(_SENDERS, thread_name_prefix="units") as senders:
            self._senders = senders
            yield
        while self._under_way:
            self._under_way.popleft().result()

    def send(self, shard: Shard, path: Path) -> None:
        """Begins to copy a committed shard, and its receipt after it; waits if many are under way.

        Raises:
            OSError: what kept an earlier one from arriving.
        """
        assert self._senders is not None
        while self._under_way and (
            len(self._under_way) >= _MOST_UNDER_WAY or self._under_way[0].done()
        ):
            self._under_way.popleft().result()
        self._keys.add(shard.key)
        self._under_way.append(self._senders.submit(self._put, shard, path))

    def _put(self, shard: Shard, path: Path) -> None:
        self._filesystem.makedirs(self._root, exist_ok=True)
        self._filesystem.put_file(str(path), f"{self._root}/{shard.key}.arrow")
        self._filesystem.pipe_file(f"{self._root}/{shard.key}.json", json_bytes(_to_receipt(shard)))
        self._whole.add(shard.key)

    def vouch(self, key: str) -> None:
        """Knows that a unit was fetched, and is whole."""
        self._whole.add(key)

    def whole(self, key: str) -> str | None:
        """Returns the path of a shard that was sent from here, or fetched and found whole."""
        return f"{self._root}/{key}.arrow" if key in self._whole else None

    def forget(self, key: str) -> None:
        """Knows that a unit is not there, or no good, so that it is sent when it is made."""
        self._keys.discard(key)
        self._whole.discard(key)

    def fetch(self, key: str, target: Path) -> Shard | None:
        """Puts the shard with `key` at `target`, unchecked, and returns its receipt.

        Raises:
            FileNotFoundError: the shard, or its receipt, is gone.
            ValueError: the receipt is not what was written.
            TypeError: it is none.
        """
        if key not in self._keys:
            return None
        receipt = self._filesystem.cat_file(f"{self._root}/{key}.json")
        self._filesystem.get_file(f"{self._root}/{key}.arrow", str(target))
        return _of_receipt(receipt)


class Ledger:
    """Commits shards and finds them again."""

    def __init__(
        self,
        progress: Path,
        header: Mapping[str, Any],
        fetch_earlier: FetchEarlier,
        say: Callable[[str], None],
        shared: SharedUnits | None = None,
    ) -> None:
        """Opens what an earlier attempt has left in `progress`.

        Args:
            header: the first line of the stream; progress of another header is started anew.
            fetch_earlier: looks for shards that are not in `progress`.
            say: is told of damaged shards.
            shared: where other machines look for what is committed, and this one first.
        """
        self._progress = progress
        self._fetch_earlier = fetch_earlier
        self._say = say
        self._shared = shared
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
                self._share(shard)
            elif (shard := self._left_elsewhere(key)) is not None:
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
        self._share(shard)
        return shard

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """Lets what is found and committed be sent to other machines: see `SharedUnits.sending`."""
        return contextlib.nullcontext() if self._shared is None else self._shared.sending()

    def shared(self, key: str) -> str | None:
        """Returns where the store has the shard of a unit, whole, if it is remote and does."""
        return None if self._shared is None else self._shared.whole(key)

    def _share(self, shard: Shard) -> None:
        if self._shared is not None and shard.key not in self._shared:
            self._shared.send(shard, self.path(shard.key))

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
            shard = _of_receipt(receipt.read_bytes())
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

    def _left_elsewhere(self, key: str) -> Shard | None:
        if self._shared is None:
            return None
        shard = self._fetched(key, self._shared.fetch, "committed by another machine")
        if shard is None:
            self._shared.forget(key)
        else:
            self._shared.vouch(key)
        return shard

    def _made_by_another_build(self, key: str) -> Shard | None:
        return self._fetched(key, self._fetch_earlier, "of an earlier tokenized corpus")

    def _fetched(self, key: str, fetch: FetchEarlier, whose: str) -> Shard | None:
        """Commits a shard that is elsewhere, if it is there and whole; says so if it is not."""
        attempt = self._attempt(key)
        attempt.unlink(missing_ok=True)
        try:
            shard = fetch(key, attempt)
        except FileNotFoundError as error:
            self._say(f"{error.filename or error} {whose} is missing.")
            return None
        except (ValueError, TypeError) as error:
            self._say(f"the receipt of {key[:12]} {whose} is damaged ({error}).")
            return None
        if shard is None:
            return None
        if (found := file_sha256(attempt)) != shard.sha256:
            self._say(
                f"{shard.file} {whose}: damaged ({_difference(found, shard)}); its documents are "
                f"encoded again."
            )
            attempt.unlink()
            return None
        shard = dataclasses.replace(shard, file=self._name(key))
        attempt.replace(self.path(key))
        self._write_receipt(shard)
        return shard

    def _write_receipt(self, shard: Shard) -> None:
        write_durably(self._receipt(shard.key), _to_receipt(shard))

    def _name(self, key: str) -> str:
        return f"{_UNITS}/{key}.arrow"

    def _attempt(self, key: str) -> Path:
        return self._progress / _UNITS / f".{key}.arrow"

    def _receipt(self, key: str) -> Path:
        return self._progress / _UNITS / f"{key}.json"


def _shard(line: Mapping[str, Any]) -> Shard:
    return Shard.of({name: value for name, value in line.items() if name != "split"})


def _to_receipt(shard: Shard) -> dict[str, Any]:
    return {"receipt": canonical.digest(_RECEIPT, shard.plain())} | shard.plain()


def _of_receipt(receipt: bytes) -> Shard:
    """Returns the shard that a receipt is about.

    Raises:
        ValueError: it is not what was written.
        TypeError: it is no receipt.
    """
    written = json.loads(receipt)
    if not isinstance(written, dict):
        raise TypeError(f"a {type(written).__name__}")
    digest = written.pop("receipt", None)
    if digest != canonical.digest(_RECEIPT, written):
        raise ValueError("it is not what was written")
    return Shard.of(written)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _difference(found: str, expected: Shard | None) -> str:
    if expected is None:
        return f"its receipt is {found}"
    return f"SHA-256 {found[:12]}, its receipt says {expected.sha256[:12]}"
