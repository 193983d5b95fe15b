"""Mixtures: exact shares of each block, each source in its own order, stages, and no state."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeling.data.mixture import (
    MixedOrder,
    PooledOrder,
    apportioned,
    block_counts,
    data_order,
)
from modeling.data.order import EpochLimitError, RowOrder
from modeling.experiment import ConfigError, validate
from modeling.training.config import BatchSchedule, DataOrderConfig, TrainerConfig

SIZES = {"code": 50, "math": 7, "web": 300}


def trainer(**fields) -> TrainerConfig:
    return validate(TrainerConfig, {"num_train_steps": 9, "train_batch_size": 8} | fields, "test")


def order(mixture=None, *, sizes=SIZES, shares=None, batches=8, **fields):
    fields = {"era_rows": 32, "seed": 4, "mixture": mixture} | fields
    config = trainer(data_order=fields).data_order
    sources = {name: (lambda wanted, n=size: n) for name, size in sizes.items()}
    return data_order(config, sources, BatchSchedule(batches), shares or sizes)


def drawn(made, start, count):
    """Returns (source, row) at each position."""
    places = {}
    for draw in made.draws(start, count):
        for place, row in zip(draw.places.tolist(), draw.rows.tolist(), strict=True):
            places[place] = (draw.source, row)
    assert sorted(places) == list(range(count)), "each place is taken once"
    return [places[place] for place in range(count)]


weights = st.fixed_dictionaries(
    {name: st.integers(0, 40).map(float) | st.floats(0.02, 9.0) for name in SIZES}
).filter(lambda w: any(w.values()))


@settings(max_examples=40)
@given(weights, st.integers(500, 3000))
def test_the_counts_of_a_block_are_the_shares_to_within_one_row_and_sum_to_the_block(shares, rows):
    total = sum(Fraction(str(weight)) for weight in shares.values())
    quotas = [Fraction(str(shares[name])) / total * rows for name in SIZES]
    assume(all(quota == 0 or quota >= 1 for quota in quotas))
    counts = block_counts(shares, list(SIZES), rows, where="here").tolist()
    assert sum(counts) == rows
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))


def test_shares_are_what_is_written_not_their_binary_neighbours():
    names = ["a", "b", "c"]
    assert block_counts({"a": 0.1, "b": 0.2, "c": 0.7}, names, 10, where="").tolist() == [1, 2, 7]
    assert block_counts(dict.fromkeys(names, 1.0), names, 11, where="").tolist() == [4, 4, 3]


@settings(max_examples=40)
@given(weights, st.integers(64, 300), st.integers(0, 2000), st.integers(0, 700))
def test_counts_in_any_window_are_exact(shares, block_rows, start, count):
    """Whole blocks hold exactly their counts; the ends of a window are parts of one block each."""
    total = sum(shares.values())
    assume(all(not weight or weight / total * block_rows > 1.01 for weight in shares.values()))
    made = order({"weights": shares, "block_rows": block_rows})
    counts = block_counts(shares, list(SIZES), block_rows, where="")
    found = Counter(source for source, _ in drawn(made, start, count))
    before, after = made.drawn_before(start), made.drawn_before(start + count)
    assert {name: found[name] for name in SIZES} == {n: after[n] - before[n] for n in SIZES}
    for name, in_block in zip(SIZES, counts.tolist(), strict=True):
        whole = (start + count) // block_rows - -(-start // block_rows)
        assert found[name] >= max(whole, 0) * in_block
        assert found[name] <= (max(whole, 0) + 2) * in_block
    first = -(-start // block_rows) * block_rows
    aligned = Counter(source for source, _ in drawn(made, first, 2 * block_rows))
    assert [aligned[name] for name in SIZES] == (2 * counts).tolist()


def test_each_source_is_drawn_in_its_own_epoch_order():
    made = order({"weights": {"code": 3, "math": 1, "web": 4}, "block_rows": 64})
    everything = drawn(made, 0, 1000)
    for name, size in SIZES.items():
        rows = [row for source, row in everything if source == name]
        alone = RowOrder(lambda wanted, n=size: n, seed=4, era_rows=32, source=name)
        assert rows == alone.rows_at(0, len(rows)).tolist()
        assert len(rows) == made.drawn_before(1000)[name]
    assert made.epochs(1000)["math"] == pytest.approx(125 / 7, abs=1)


def test_the_mixture_is_golden():
    made = order({"weights": {"code": 2, "web": 1, "math": 1}, "block_rows": 12})
    assert " ".join(source for source, _ in drawn(made, 0, 24)) == GOLDEN


def test_blocks_are_permuted_each_in_its_own_way():
    made = order({"weights": {"code": 1, "web": 1, "math": 0}, "block_rows": 64})
    blocks = {tuple(s for s, _ in drawn(made, 64 * block, 64)) for block in range(20)}
    assert len(blocks) == 20
    assert all("math" not in block for block in blocks)


def test_the_draws_do_not_depend_on_how_they_are_asked():
    stages = [
        {"start_step": 0, "weights": {"code": 1, "math": 1, "web": 6}},
        {"start_step": 13, "weights": {"code": 5, "math": 0, "web": 3}},
        {"start_step": 14, "weights": {"code": 1, "math": 2, "web": 1}},
    ]
    made = order({"stages": stages, "block_rows": 16})
    whole = drawn(made, 0, 300)
    assert [item for i in range(300) for item in drawn(made, i, 1)] == whole
    for start, count in [(100, 8), (103, 40), (0, 0), (111, 1), (112, 188)]:
        assert drawn(made, start, count) == whole[start : start + count]


def test_a_stage_begins_a_block_where_its_first_step_begins():
    stages = [
        {"start_step": 0, "weights": {"code": 1, "math": 1, "web": 2}},
        {"start_step": 5, "weights": {"code": 1, "math": 0, "web": 0}},
        {"start_step": 7, "weights": {"code": 0, "math": 0, "web": 1}},
    ]
    made = order({"stages": stages, "block_rows": 16})
    source = [name for name, _ in drawn(made, 0, 100)]
    assert set(source[40:56]) == {"code"}
    assert set(source[56:]) == {"web"}
    assert Counter(source[:16]) == {"code": 4, "math": 4, "web": 8}
    # No row is lost or drawn twice where weights change: each source goes on where it stood.
    rows = [row for name, row in drawn(made, 0, 400) if name == "web"]
    alone = RowOrder(lambda wanted: 300, seed=4, era_rows=32, source="web")
    assert rows == alone.rows_at(0, len(rows)).tolist()


def test_a_later_stage_changes_nothing_before_it():
    first = {"start_step": 0, "weights": {"code": 1, "math": 1, "web": 2}}
    then = {"start_step": 10, "weights": {"code": 1, "math": 3, "web": 2}}
    one, two = order({"stages": [first]}), order({"stages": [first, then]})
    assert drawn(one, 0, 80) == drawn(two, 0, 80)
    assert drawn(one, 80, 80) != drawn(two, 80, 80)


def test_stages_count_in_steps_whatever_the_batch_size():
    stages = [
        {"start_step": 0, "weights": {"code": 1, "math": 0, "web": 0}},
        {"start_step": 4, "weights": {"code": 0, "math": 0, "web": 1}},
    ]
    sizes = trainer(
        train_batch_size=[{"start_step": 0, "size": 2}, {"start_step": 3, "size": 5}]
    ).batches
    config = trainer(data_order={"mixture": {"stages": stages}}).data_order
    made = data_order(config, {name: lambda wanted: 50 for name in SIZES}, sizes, SIZES)
    assert [name for name, _ in drawn(made, 0, 20)] == ["code"] * 11 + ["web"] * 9


def test_without_weights_each_row_of_every_source_is_drawn_once_an_epoch():
    made = order(sizes=SIZES)
    total = sum(SIZES.values())
    everything = sorted((name, row) for name, size in SIZES.items() for row in range(size))
    epochs = [drawn(made, epoch * total, total) for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [everything, everything]
    assert epochs[0] != epochs[1]
    halves = Counter(name for name, _ in epochs[0][: total // 2])
    assert 120 < halves["web"] < 180, "sources are spread over the epoch"
    assert made.epochs(2 * total) == dict.fromkeys(SIZES, 2.0)


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.integers(1, 60), st.integers(1, 999)), min_size=2
    ),
    st.integers(1, 40),
)
def test_an_era_of_all_sources_holds_their_next_rows_by_shares_until_they_end(sources, era_rows):
    """The line is written out: row i of source s has the place (2i + 1) / share of s."""
    sizes = {name: rows for name, (rows, _) in sources.items()}
    shares = {name: share for name, (_, share) in sources.items()}
    line = [
        (name, row)
        for _, name, row in sorted(
            (Fraction(2 * row + 1, shares[name]), name, row)
            for name in sizes
            for row in range(sizes[name])
        )
    ]
    made = order(sizes=sizes, shares=shares, era_rows=era_rows)
    for start in range(0, len(line), era_rows):
        era = line[start : start + era_rows]
        assert sorted(drawn(made, start, len(era))) == sorted(era)


def test_an_era_asks_no_source_for_more_than_its_part():
    asked = {"a": 0, "b": 0}

    def known(name):
        def rows(wanted):
            asked[name] = max(asked[name], wanted)
            return wanted  # there is no end of it

        return rows

    config = trainer(data_order={"era_rows": 40}).data_order
    made = data_order(config, {n: known(n) for n in asked}, BatchSchedule(8), {"a": 3, "b": 1})
    made.draws(0, 41)
    assert asked == {"a": 60, "b": 20}


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=6), st.integers(0, 2**62))
def test_shares_of_any_size_are_exact(weights, rows):
    counts = apportioned(rows, weights)
    assert sum(counts) == rows
    places = [
        (Fraction(2 * n - 1, w), Fraction(2 * n + 1, w))
        for n, w in zip(counts, weights, strict=True)
    ]
    assert max(last for last, _ in places) <= min(following for _, following in places)


def test_a_source_alone_keeps_its_eras():
    made = order(sizes={"": 100})
    alone = RowOrder(lambda wanted: 100, seed=4, era_rows=32, source="")
    (draw,) = made.draws(90, 40)
    assert np.array_equal(draw.rows, alone.rows_at(90, 40))
    assert isinstance(made, PooledOrder)
    assert isinstance(order({"weights": {"": 1}}, sizes={"": 100}), MixedOrder)


def test_a_source_that_would_be_drawn_too_often_is_named():
    made = order({"weights": {"code": 1, "math": 1, "web": 2}, "block_rows": 16}, max_epochs=3)
    with pytest.raises(EpochLimitError, match=r"3 epochs of source 'math' are 21 rows"):
        made.draws(0, 100)


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({"weights": {"code": 1, "web": 1}}, r"mixture\.weights: no weight for source 'math'"),
        ({"weights": {**SIZES, "wbe": 1}}, r"the dataset has no source 'wbe'; it has \['code'"),
        (
            {"weights": {"code": 0.01, "web": 1, "math": 1}, "block_rows": 64},
            r"code's share, 0\.005, is less than one row in a block of 64",
        ),
        (
            {"stages": [{"start_step": 0, "weights": {"code": 1}}]},
            r"mixture\.stages\[0\]\.weights: no weight for source 'math'",
        ),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(mixture, complaint):
    with pytest.raises(ValueError, match=complaint):
        order(mixture)


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({"weights": {"a": 0}}, "at least one weight must be above 0"),
        ({"weights": {"a": -1}}, "greater than or equal to 0"),
        ({}, "either weights or stages"),
        ({"weights": {"a": 1}, "stages": [{"start_step": 0, "weights": {"a": 1}}]}, "either"),
        ({"stages": [{"start_step": 3, "weights": {"a": 1}}]}, "must begin at step 0"),
        (
            {"stages": [{"start_step": n, "weights": {"a": 1}} for n in (0, 5, 5)]},
            r"each after the one before, not \[0, 5, 5\]",
        ),
        ({"weights": {"a": 1}, "block_rows": 0}, "greater than or equal to 1"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused_by_field(mixture, complaint):
    with pytest.raises(ConfigError, match=rf"data_order\.mixture.*{complaint}"):
        trainer(data_order={"mixture": mixture})


def test_the_batch_schedule_is_a_function_of_the_step():
    stages = [{"start_step": 0, "size": 16}, {"start_step": 3, "size": 32}]
    batches = trainer(train_batch_size=stages).batches
    assert [batches.size(step) for step in range(5)] == [16, 16, 16, 32, 32]
    assert [batches.cursor(step) for step in range(6)] == [0, 16, 32, 48, 80, 112]
    assert batches.sizes == (16, 32)
    assert BatchSchedule(8).cursor(10**12) == 8 * 10**12
    assert DataOrderConfig().mixture is None


GOLDEN = (
    "math code code math code web code math code web web code "
    "code web code code code code math math web code web math"
)
