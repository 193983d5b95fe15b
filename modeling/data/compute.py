"""Who encodes the units: this process, or tasks on a Ray cluster. The results are the same.

A task takes the texts of a unit and returns their ids, and whoever asked writes them. So workers
share no file system with this process, and one that dies leaves nothing behind: Ray gives its task
to another. At most two tasks a worker are under way, which bounds the memory.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers

from modeling import canonical
from modeling.data.config import RayCompute, TokenizationConfig
from modeling.data.encoding import (
    DocumentEncoder,
    DocumentError,
    Encoded,
    EncodedUnit,
    TextEncoder,
    document_encoder,
)
from modeling.data.formats_config import Format
from modeling.data.long_texts import LongText, Text
from modeling.data.pieces import PIECE_BYTES
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer, load_tokenizer
from modeling.data.units import Unit
from modeling.inventory import INVENTORY

_BATCH_BYTES = 4 * 1024 * 1024
_BATCH_DOCUMENTS = 4096
_LIVES = 5
SHOWN_SKIPPED = 10
_SHOWN_CHARACTERS = 400
_TASKS_A_WORKER = 2


class WorkersLostError(RuntimeError):
    """A cluster has lost a unit for good: the workers that tried it, or what they gave back."""


class ClusterError(RuntimeError):
    """There is no cluster where one was said to be."""


@dataclass(frozen=True)
class Encoding:
    """All that ids depend on beside the texts, in a form that travels."""

    config: TokenizationConfig
    formats: Mapping[str, Format]
    """What the documents of each split are."""
    files: Mapping[str, bytes]
    """Of the built tokenizer, by name."""
    skipping: frozenset[str] = frozenset()
    """Splits of which documents that have no ids are left out."""

    @classmethod
    def read(
        cls,
        config: TokenizationConfig,
        formats: Mapping[str, Format],
        tokenizer_dir: Path,
        *,
        skipping: Iterable[str] = (),
    ) -> "Encoding":
        """Reads a built tokenizer."""
        paths = sorted(path for path in tokenizer_dir.iterdir() if path.name != INVENTORY)
        files = {path.name: path.read_bytes() for path in paths}
        return cls(config, formats, files, frozenset(skipping))

    @property
    def has_loss_mask(self) -> bool:
        """Whether tokens are told apart into those to be predicted and others, in all splits."""
        return not all(one.learns_all for one in self.formats.values())

    @property
    def digest(self) -> str:
        """Of all of this."""
        policies = {split: self.policy(split) for split in self.formats}
        return canonical.digest("encodings/1", policies)

    def policy(self, split: str) -> str:
        """Digest of what the units of a split are encoded by: part of the key of each."""
        document_format = self.formats[split]
        rendering = dict(document_format.rendering())
        if self.has_loss_mask and document_format.learns_all:
            rendering["loss_mask"] = "of ones"
        if split in self.skipping:
            rendering["on_error"] = "skip"
        library = tokenizers.__version__
        return canonical.digest("encoding/1", [self.config, rendering, self._digests, library])

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    def encoders(self, tokenizer: Tokenizer | PassthroughTokenizer) -> dict[str, DocumentEncoder]:
        """Returns what encodes the documents of each split, by the tokenizer of these files."""
        policies = {split: self.policy(split) for split in self.formats}
        of_policy = {
            policy: document_encoder(
                tokenizer, self.config, self.formats[split], has_loss_mask=self.has_loss_mask
            )
            for policy, split in {policy: split for split, policy in policies.items()}.items()
        }
        return {split: of_policy[policy] for split, policy in policies.items()}

    def open(self) -> dict[str, DocumentEncoder]:
        """Returns the encoders, wherever this has travelled."""
        with tempfile.TemporaryDirectory() as directory:
            for name, data in self.files.items():
                (Path(directory) / name).write_bytes(data)
            return self.encoders(load_tokenizer(Path(directory)))


def encode_unit(
    encoder: DocumentEncoder,
    doc_ids: list[str],
    texts: list[Text],
    *,
    skips: bool = False,
    scratch: Path | None = None,
) -> EncodedUnit:
    """Returns the ids of a unit's documents.

    Args:
        encoder: makes them.
        doc_ids: names of the documents.
        texts: of each.
        skips: whether to leave out documents that have no ids, and count them.
        scratch: where the ids go of a text that is on disk itself, so that neither takes memory.

    Raises:
        ValueError: a document has no ids, and is not to be left out; the message names it.
    """
    if scratch is not None and isinstance(encoder, TextEncoder) and _is_long(texts):
        return EncodedUnit(encoder.spilled(texts[0], scratch), len(texts[0]))
    parts, start, good_until = [], 0, 0
    skipped: list[tuple[int, str]] = []
    num_skipped = skipped_bytes = 0
    while start < len(texts):
        stop = good_until if good_until > start else _end_of_batch(texts, start)
        try:
            if isinstance(encoder, TextEncoder) and len(texts[start]) > PIECE_BYTES:
                parts.append(encoder.encode_long(texts[start]))
            else:
                parts.append(encoder.encode([bytes(text) for text in texts[start:stop]]))
        except DocumentError as error:
            if not skips:
                raise ValueError(f"{doc_ids[start + error.index]}: {error}") from error
            if error.index:  # those before it first
                good_until = start + error.index
                continue
            num_skipped += 1
            skipped_bytes += len(texts[start])
            if len(skipped) < SHOWN_SKIPPED:
                skipped.append((start, str(error)[:_SHOWN_CHARACTERS]))
            stop = start + 1
        start = stop
    if not parts:
        parts.append(encoder.encode([]))
    encoded = parts[0] if len(parts) == 1 else Encoded.join(parts)
    text_bytes = sum(map(len, texts)) - skipped_bytes
    return EncodedUnit(encoded, text_bytes, num_skipped, skipped_bytes, tuple(skipped))


@runtime_checkable
class Encode(Protocol):
    """What a task does: `encode_unit`."""

    def __call__(
        self, encoder: DocumentEncoder, doc_ids: list[str], texts: list[Text], *, skips: bool
    ) -> EncodedUnit:
        """Returns the ids of a unit's documents."""
        ...


Keyed = tuple[str, Unit]
Result = tuple[str, EncodedUnit]


@dataclass(frozen=True)
class Here:
    """Encodes units in this process."""

    encoders: Mapping[str, DocumentEncoder]
    """Of each split."""
    skipping: Collection[str] = ()
    """Splits of which documents that have no ids are left out."""
    scratch: Path | None = None
    """Where the ids of long documents go."""

    def encode(self, unit: Unit) -> EncodedUnit:
        """Returns the ids of a unit's documents."""
        skips, scratch = unit.split in self.skipping, self.scratch
        encoder = self.encoders[unit.split]
        return encode_unit(encoder, unit.doc_ids, unit.texts, skips=skips, scratch=scratch)


def encoded_here(here: Here, units: Iterable[Keyed]) -> Iterator[Result]:
    """Yields key and ids of each unit, in order."""
    return ((key, here.encode(unit)) for key, unit in units)


def encoded_by_ray(
    compute: RayCompute,
    encoding: Encoding,
    units: Iterable[Keyed],
    *,
    encode: Encode = encode_unit,
    encode_long: Here | None = None,
) -> Iterator[Result]:
    """Yields key and ids of each unit, in the order in which they are finished.

    Args:
        compute: where the cluster is, and how much of it to use.
        encoding: tokenizer and policy.
        units: taken only as fast as they are encoded.
        encode: what a task does.
        encode_long: encodes documents that are not in memory, which a task would have to hold;
            None: tasks get them too.

    Raises:
        WorkersLostError: a unit was tried several times, and each time its worker died.
    """
    with ray_cluster(compute) as ray:
        task = ray.remote(_run_task).options(max_retries=_LIVES - 1)
        given = ray.put((encoding, encode))
        workers = compute.max_workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        keys: dict[Any, str] = {}
        for key, unit in units:
            if encode_long is not None and _is_long(unit.texts):
                yield key, encode_long.encode(unit)
                continue
            while len(keys) >= workers * _TASKS_A_WORKER:
                yield _first_finished(ray, keys)
            texts = [bytes(text) for text in unit.texts]
            try:
                given_unit = task.remote(given, encoding.digest, unit.split, unit.doc_ids, texts)
            except ray.exceptions.RayError as error:
                raise _lost(ray, key, error) from error
            keys[given_unit] = key
        while keys:
            yield _first_finished(ray, keys)


@contextlib.contextmanager
def ray_cluster(compute: RayCompute) -> Iterator[Any]:
    """Yields `ray`, connected to the cluster at an address or to one that lives as long as this.

    One that is started here listens on 127.0.0.1 alone, has no dashboard and reports to nobody. A
    process that is connected already stays so.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if compute.address is None:
        # Elsewhere than on Linux Ray does so by itself: all its servers listen on 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        yield ray
        return
    where: dict[str, Any] = {"address": compute.address}
    if compute.address is None:
        where = {
            "address": "local",
            "num_cpus": compute.max_workers,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"compute.address: no Ray cluster can be joined at {compute.address!r}, or started "
            f"here if that is None ({type(error).__name__}: {error}). Correct the address, or "
            f"leave it out to start a cluster on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_finished(ray: Any, keys: dict[Any, str]) -> Result:
    (done,), _ = ray.wait(list(keys), num_returns=1)
    key = keys.pop(done)
    try:
        encoded = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise _lost(ray, key, error) from error
    return key, encoded


def _lost(ray: Any, key: str, error: Exception) -> WorkersLostError:
    return WorkersLostError(
        f"unit {key[:12]}: {_what_was_lost(ray, error)} ({type(error).__name__}: {error}). What "
        f"was committed is kept, so run again."
    )


def _what_was_lost(ray: Any, error: Exception) -> str:
    """Returns what an error of Ray's means here, and what to do about it."""
    errors = ray.exceptions
    match error:
        case errors.OutOfMemoryError():
            return (
                f"{_LIVES} workers were ended while encoding it, as their machine had no memory "
                f"left; lower `compute.max_workers`, or `unit_bytes` of the dataset"
            )
        case errors.WorkerCrashedError() | errors.NodeDiedError() | errors.LocalRayletDiedError():
            return (
                f"{_LIVES} workers died while encoding it; look for their reasons (memory?) in "
                f"Ray's logs"
            )
        case errors.ObjectLostError():
            return (
                "its texts or ids were lost with the machine that held them, and could not be made "
                "again; look for its reason in Ray's logs"
            )
        case errors.ObjectStoreFullError() | errors.OutOfDiskError():
            return (
                "Ray has no room for its texts or ids; lower `compute.max_workers`, or give Ray "
                "more memory or disk (`--object-store-memory`, `--temp-dir`)"
            )
        case _:
            return "Ray could not encode it"


_opened: dict[str, dict[str, DocumentEncoder]] = {}


def _run_task(
    given: tuple[Encoding, Encode], digest: str, split: str, doc_ids: list[str], texts: list[Text]
) -> EncodedUnit:
    """Runs in a worker, which keeps its encoder, and what this remembers, for the next task."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a task has one processor
    encoding, encode = given
    if digest not in _opened:
        _opened.clear()
        _opened[digest] = encoding.open()
    skips = split in encoding.skipping
    return encode(_opened[digest][split], doc_ids, texts, skips=skips)


def _is_long(texts: list[Text]) -> bool:
    """Whether these are one text that is on disk; no unit has another beside it."""
    return isinstance(texts[0], LongText)


def _end_of_batch(texts: list[Text], start: int) -> int:
    """Returns where a batch ends; a document of many pieces has one of its own."""
    stop, num_bytes = start + 1, len(texts[start])
    most = min(start + _BATCH_DOCUMENTS, len(texts))
    limit = min(_BATCH_BYTES, PIECE_BYTES)
    while stop < most and num_bytes < limit and len(texts[stop]) <= PIECE_BYTES:
        num_bytes += len(texts[stop])
        stop += 1
    return stop
