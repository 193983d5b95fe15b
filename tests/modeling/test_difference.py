"""Differences are named by field, and none is missed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling import canonical
from modeling.data.tokenizers_config import BpeTokenizerConfig
from modeling.difference import differences

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("ab ", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", min_size=1), inner),
    max_leaves=8,
)


def told(before, after):
    return [str(found) for found in differences(before, after)]


def test_a_field_of_a_record_is_named_by_its_path():
    trees = [
        canonical.plain({"tokenizer": BpeTokenizerConfig(type="bpe", vocab_size=size)})
        for size in (4096, 8192)
    ]
    assert told(*trees) == ["tokenizer.vocab_size 4096 -> 8192"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 1.0}, ["a 1 -> 1.0"]),
        ({"a": 0.0}, {"a": -0.0}, ["a 0.0 -> -0.0"]),
        ({"a": 1}, {"a": True}, ["a 1 -> True"]),
        ({"a": 1}, {}, ["a 1 -> unset"]),
        ({}, {"a": None}, ["a unset -> None"]),
        ({"a": ""}, {"a": "b c"}, ["a '' -> 'b c'"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a.1 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 3]}, ["a [1] -> [1, 3]"]),
        ({"b": 1, "a": {"c": 1}}, {"b": 2, "a": {"c": 2}}, ["a.c 1 -> 2", "b 1 -> 2"]),
        ({"o": {"$type": "adamw/1", "x": 1}}, {"o": {"$type": "lion/1"}}, ["o adamw/1 -> lion/1"]),
    ],
)
def test_each_kind_of_change(before, after, expected):
    assert told(before, after) == expected


@given(PLAIN, PLAIN)
def test_trees_differ_here_just_where_their_encodings_do(before, after):
    trees = {"t": before}, {"t": after}
    assert bool(told(*trees)) == (canonical.encode(trees[0]) != canonical.encode(trees[1]))
