"""The order of all sources: whose turn it is at each position, and which of its rows is drawn.

Without weights all sources are one: their rows, in the order of their names, are permuted over the
whole epoch, so that each row is drawn once an epoch and sources come in proportion to their rows.
(A dataset of one source keeps its eras, which let training begin before its last row is known.)

With weights positions run through blocks of B = `block_rows`. Of each block, source s has exactly

    n_s = floor(B w_s / sum of w), plus one for the largest remainders until sum of n_s = B

positions, in exact rational arithmetic; which ones is a keyed permutation of the block. A source is
drawn in its own epoch order (`modeling.data.order`) and begins its next epoch when it is exhausted.
A stage of other weights begins a new block at the position where its first step begins. Everything
is a function of the position: no state, whoever asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from modeling.data.order import EVERY_ROW, KnownRows, RowOrder, permute, round_keys
from modeling.training.config import BatchSchedule, DataOrderConfig, MixtureConfig

POOL = "*"
"""The name under which several sources without weights are permuted together."""


class Draw(NamedTuple):
    """Rows of one source, and which places of the batch they take, in order."""

    source: str
    places: Int64[np.ndarray, " rows"]
    rows: Int64[np.ndarray, " rows"]


@runtime_checkable
class DataOrder(Protocol):
    """What is drawn at each position."""

    def draws(self, start: int, count: int) -> list[Draw]:
        """Returns what is drawn at positions `start` to `start + count`, by source."""
        ...

    def epochs(self, position: int) -> dict[str, float]:
        """Returns how often the rows of each source are drawn before a position, on average."""
        ...


def data_order(
    config: DataOrderConfig, sources: Mapping[str, KnownRows], batches: BatchSchedule
) -> DataOrder:
    """Returns the order that `config` asks for.

    Args:
        config: seed, eras and weights.
        sources: the number of rows of each source by name; the only one may be unnamed ("").
        batches: where each step begins.

    Raises:
        ValueError: the weights name a source that there is not, or too small a share of a block.
    """
    if config.mixture is not None:
        return MixedOrder(config, config.mixture, sources, batches)
    return PooledOrder(config, sources)


class PooledOrder:
    """All sources as one."""

    def __init__(self, config: DataOrderConfig, sources: Mapping[str, KnownRows]) -> None:
        """See `data_order`."""
        self._names = sorted(sources)
        self._starts: Int64[np.ndarray, " ends"] | None = None
        if len(sources) == 1:
            (known_rows,), era_rows, name = sources.values(), config.era_rows, self._names[0]
        else:
            # Every size must be known, for a row's number says which source it is of.
            sizes = [sources[name](EVERY_ROW) for name in self._names]
            self._starts = np.cumsum([0, *sizes])
            total = sum(sizes)
            known_rows, era_rows, name = (lambda wanted: total), max(total, 1), POOL
        self._known_rows: KnownRows = known_rows
        self._order = RowOrder(
            known_rows,
            seed=config.seed,
            era_rows=era_rows,
            source=name,
            max_epochs=config.max_epochs,
        )

    def draws(self, start: int, count: int) -> list[Draw]:
        """See `DataOrder`."""
        rows = self._order.rows_at(start, count)
        if self._starts is None:
            return [Draw(self._names[0], np.arange(count), rows)]
        of = np.searchsorted(self._starts, rows, side="right") - 1
        found = []
        for index in np.unique(of).tolist():
            places = np.flatnonzero(of == index)
            found.append(Draw(self._names[index], places, rows[places] - self._starts[index]))
        return found

    def epochs(self, position: int) -> dict[str, float]:
        """See `DataOrder`."""
        return dict.fromkeys(self._names, position / self._known_rows(EVERY_ROW))


@dataclass(frozen=True)
class _Stage:
    """Positions from `start` on, in blocks of the same counts."""

    start: int
    counts: Int64[np.ndarray, " sources"]
    drawn: Int64[np.ndarray, " sources"]
    """Rows of each source drawn before `start`."""


class MixedOrder:
    """Sources in given shares."""

    def __init__(
        self,
        config: DataOrderConfig,
        mixture: MixtureConfig,
        sources: Mapping[str, KnownRows],
        batches: BatchSchedule,
    ) -> None:
        """See `data_order`."""
        self._seed = config.seed
        self._block_rows = mixture.block_rows
        self._names = sorted(sources)
        self._known_rows = sources
        self._orders = [
            RowOrder(
                sources[name],
                seed=config.seed,
                era_rows=config.era_rows,
                source=name,
                max_epochs=config.max_epochs,
            )
            for name in self._names
        ]
        # Neighbouring batches share a block.
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._stages: list[_Stage] = []
        drawn = np.zeros(len(self._names), np.int64)
        for index, stage in enumerate(mixture.in_stages()):
            counts = block_counts(
                stage.weights, self._names, mixture.block_rows,
                where="trainer.data_order.mixture.weights"
                if mixture.weights is not None
                else f"trainer.data_order.mixture.stages[{index}].weights",
            )  # fmt: skip
            start = batches.cursor(stage.start_step)
            if self._stages:
                drawn = self._drawn_in(self._stages[-1], start)
            self._stages.append(_Stage(start, counts, drawn))

    def draws(self, start: int, count: int) -> list[Draw]:
        """See `DataOrder`."""
        if start < 0 or count < 0:
            raise ValueError(f"positions {start} to {start + count}: both must be at least 0.")
        of = self._sources_at(start, count)
        drawn = self._drawn(start)
        found = []
        for index in np.unique(of).tolist():
            places = np.flatnonzero(of == index)
            rows = self._orders[index].rows_at(int(drawn[index]), len(places))
            found.append(Draw(self._names[index], places, rows))
        return found

    def epochs(self, position: int) -> dict[str, float]:
        """See `DataOrder`."""
        drawn = self.drawn_before(position)
        return {name: drawn[name] / self._known_rows[name](EVERY_ROW) for name in self._names}

    def drawn_before(self, position: int) -> dict[str, int]:
        """Returns how many rows of each source are drawn before a position."""
        return dict(zip(self._names, self._drawn(position).tolist(), strict=True))

    def _drawn(self, position: int) -> Int64[np.ndarray, " sources"]:
        return self._drawn_in(self._stage_at(position), position)

    def _drawn_in(self, stage: _Stage, position: int) -> Int64[np.ndarray, " sources"]:
        blocks, rest = divmod(position - stage.start, self._block_rows)
        begun = np.bincount(self._block(stage.start, blocks)[:rest], minlength=len(self._names))
        return stage.drawn + blocks * stage.counts + begun

    def _stage_at(self, position: int) -> _Stage:
        return [stage for stage in self._stages if stage.start <= position][-1]

    def _sources_at(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Returns the index of the source at each position."""
        pieces, position, end = [np.empty(0, np.int64)], start, start + count
        starts = [stage.start for stage in self._stages] + [EVERY_ROW]
        for first, following in pairwise(starts):
            while first <= position < min(following, end):
                block, offset = divmod(position - first, self._block_rows)
                pieces.append(self._block(first, block)[offset:][: min(following, end) - position])
                position += len(pieces[-1])
        return np.concatenate(pieces)

    def _make_block(self, stage_start: int, block: int) -> Int64[np.ndarray, " block"]:
        """Returns the source of each position of a block."""
        (counts,) = [stage.counts for stage in self._stages if stage.start == stage_start]
        keys = round_keys("order.mixture/1", self._seed, stage_start, block)
        slots = permute(np.arange(self._block_rows, dtype=np.uint64), self._block_rows, keys)
        return np.repeat(np.arange(len(counts)), counts)[slots.astype(np.int64)]


def block_counts(
    weights: Mapping[str, float], names: Sequence[str], block_rows: int, *, where: str
) -> Int64[np.ndarray, " sources"]:
    """Returns how many positions of a block each source has, by the largest remainder.

    Raises:
        ValueError: a weight is missing, names no source, or gives a source no position.
    """
    if missing := [name for name in names if name not in weights]:
        raise ValueError(
            f"{where}: no weight for source {missing[0]!r}; give each of {list(names)} one, 0.0 to "
            f"leave it out."
        )
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(
            f"{where}: the dataset has no source {unknown[0]!r}; it has {list(names)}."
        )
    # As written: 0.7 is seven tenths, whatever binary fraction stands for it.
    exact = [Fraction(str(weights[name])) for name in names]
    quotas = [block_rows * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    largest_first = sorted(range(len(names)), key=lambda i: (counts[i] - quotas[i], i))
    for index in largest_first[: block_rows - sum(counts)]:
        counts[index] += 1
    for name, weight, count in zip(names, exact, counts, strict=True):
        if weight and not count:
            raise ValueError(
                f"{where}: {name}'s share, {float(weight / sum(exact)):.2g}, is less than one row "
                f"in a block of {block_rows}; raise it, or trainer.data_order.mixture.block_rows."
            )
    return np.array(counts, np.int64)
