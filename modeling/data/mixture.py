"""The order of all sources: whose turn it is at each position, and which of its rows is drawn.

Without weights all sources are one, each of whose rows is drawn once an epoch. They stand in a line
in which row i of source s has the place (2i + 1) / b_s, where b_s is the source's bytes of text: so
the first n of the line hold each source in proportion to its text, to within a row or so, as seats
are given to parties (Webster 1832; Sainte-Lague 1910), until one source after another has no more.
The line is cut into eras, and rows are permuted inside each, as those of an only source are. Bytes
of text are known before the first token: training may begin before the last row is known.

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
    config: DataOrderConfig,
    sources: Mapping[str, KnownRows],
    batches: BatchSchedule,
    shares: Mapping[str, int],
) -> DataOrder:
    """Returns the order that `config` asks for.

    Args:
        config: seed, eras and weights.
        sources: the number of rows of each source by name; the only one may be unnamed ("").
        batches: where each step begins.
        shares: of the sources in an epoch without weights, relative to each other.

    Raises:
        ValueError: the weights name a source that there is not, or too small a share of a block.
    """
    if config.mixture is not None:
        return MixedOrder(config, config.mixture, sources, batches)
    return PooledOrder(config, sources, shares)


class PooledOrder:
    """All sources as one."""

    def __init__(
        self,
        config: DataOrderConfig,
        sources: Mapping[str, KnownRows],
        shares: Mapping[str, int],
    ) -> None:
        """See `data_order`."""
        self._names = sorted(sources)
        self._known_rows = [sources[name] for name in self._names]
        self._shares = [shares[name] for name in self._names]
        self._era_rows = config.era_rows
        # What is known of the line's beginning never changes, and each batch asks for it.
        self._until = lru_cache(maxsize=8)(self._rows_until)
        self._order = RowOrder(
            lambda wanted: sum(self._until(wanted)),
            seed=config.seed,
            era_rows=config.era_rows,
            source=self._names[0] if len(self._names) == 1 else POOL,
            max_epochs=config.max_epochs,
        )

    def draws(self, start: int, count: int) -> list[Draw]:
        """See `DataOrder`."""
        rows = self._order.rows_at(start, count)
        if len(self._names) == 1:
            return [Draw(self._names[0], np.arange(count), rows)]
        found = []
        eras = rows // self._era_rows
        for era in np.unique(eras).tolist():
            first, end = (self._until(n * self._era_rows) for n in (era, era + 1))
            starts = np.cumsum([0, *(b - a for a, b in zip(first, end, strict=True))])
            places = np.flatnonzero(eras == era)
            offsets = rows[places] - era * self._era_rows
            of = np.searchsorted(starts, offsets, side="right") - 1
            for index in np.unique(of).tolist():
                here = of == index
                of_source = offsets[here] - starts[index] + first[index]
                found.append(Draw(self._names[index], places[here], of_source))
        return found

    def epochs(self, position: int) -> dict[str, float]:
        """See `DataOrder`."""
        return dict.fromkeys(self._names, position / sum(self._until(EVERY_ROW)))

    def _rows_until(self, wanted: int) -> tuple[int, ...]:
        """Returns how many of the line's first `wanted` rows, or of all, each source has."""
        most: dict[int, int] = {}
        while len(most) < len(self._names):
            rest = [index for index in range(len(self._names)) if index not in most]
            weights = [self._shares[index] for index in rest]
            asked = dict(zip(rest, apportioned(wanted - sum(most.values()), weights), strict=True))
            known = {index: self._known_rows[index](rows) for index, rows in asked.items()}
            ended = {index: rows for index, rows in known.items() if rows < asked[index]}
            most |= ended or asked
        return tuple(most[index] for index in range(len(self._names)))


def apportioned(rows: int, weights: Sequence[int]) -> list[int]:
    """Returns how many of the first `rows` places (2i + 1) / w, i = 0, 1, ..., each weight has.

    Of equal places that of the first weight comes first.
    """
    if rows <= 0:
        return [0] * len(weights)
    total = sum(weights)
    counts = [(2 * rows * weight + total) // (2 * total) for weight in weights]

    def place(index: int, row: int) -> tuple[Fraction, int]:
        return Fraction(2 * row + 1, weights[index]), index

    indices = range(len(weights))
    while (lacking := rows - sum(counts)) > 0:
        counts[min(indices, key=lambda index: place(index, counts[index]))] += 1
    for _ in range(-lacking):
        held = (index for index in indices if counts[index])
        counts[max(held, key=lambda index: place(index, counts[index] - 1))] -= 1
    return counts


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
