"""Rows of several documents: to the model, each document is what it would be alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import Axis, NamedArray
from modeling.data.rows import Rows
from modeling.models.config import Gpt2Config
from modeling.models.lm import LmExample, build_model, next_token_loss, token_losses
from modeling.models.segments import attendable, positions

Vocab, Pos, KPos, Batch = Axis("vocab", 50), Axis("position", 24), Axis("key", 24), Axis("batch", 2)
CONFIG = Gpt2Config(hidden_dim=32, num_layers=2, num_heads=2, initializer_range=0.3)
DRAW = np.random.default_rng(0)
DOCUMENTS = [[DRAW.integers(0, 50, n) for n in sizes] for sizes in ((8, 1, 8), (8, 16))]
EOS = 7


def packed(documents=DOCUMENTS):
    """The documents of each row side by side, padded with EOS."""
    tokens = np.full((len(documents), Pos.size), EOS, np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, of_row in enumerate(documents):
        start = 0
        for number, document in enumerate(of_row, start=1):
            tokens[row, start : start + len(document)] = document
            segment_ids[row, start : start + len(document)] = number
            start += len(document)
    return Rows(tokens, segment_ids, segment_ids > 0)


def example(rows):
    axes = Batch.resize(len(rows.tokens)), Pos.resize(rows.tokens.shape[1])
    named = [None if c is None else NamedArray(jnp.asarray(c), axes) for c in rows]
    return LmExample.causal(named[0], Pos.name, named[1], named[2])


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, Vocab, Pos, key=jax.random.key(0))


@eqx.filter_jit
def losses_of(model, example):
    return token_losses(model, example.tokens, segment_ids=example.segment_ids).array


@eqx.filter_jit
def loss_and_gradient(model, example):
    def total(model):
        return next_token_loss(model, example)

    return eqx.filter_value_and_grad(total, has_aux=True)(model)


def alone(document):
    return example(Rows(np.asarray(document, np.int32)[None]))


def test_each_position_sees_itself_and_what_stands_before_it_in_its_document():
    segment_ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2]])
    P, K = Pos.resize(8), KPos.resize(8)
    named = hax.named(jnp.asarray(segment_ids), (Batch, P))
    expected = [
        [[k <= q and row[k] == row[q] for k in range(8)] for q in range(8)] for row in segment_ids
    ]
    found = attendable(P, K, named).rearrange((Batch, P, K)).array
    np.testing.assert_array_equal(found, expected)
    causal = attendable(P, K).rearrange((P, K)).array
    np.testing.assert_array_equal(causal, np.tri(8, dtype=bool))


def test_positions_begin_anew_with_each_document():
    segment_ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    named = hax.named(jnp.asarray(segment_ids), (Batch, Pos.resize(8)))
    np.testing.assert_array_equal(positions(named, Pos.resize(8)).array, expected)
    np.testing.assert_array_equal(
        Rows(np.zeros_like(segment_ids), segment_ids).positions(), expected
    )
    turned = positions(named.rearrange(("position", "batch")), Pos.resize(8))
    np.testing.assert_array_equal(turned.array.T, expected)
    assert Rows(np.zeros((2, 3), np.int32)).positions().tolist() == [[0, 1, 2], [0, 1, 2]]


def test_what_counts_is_what_the_masks_leave():
    rows = Rows(
        np.zeros((1, 8), np.int32),
        np.array([[1, 1, 1, 1, 2, 2, 0, 0]], np.int32),
        np.array([[1, 0, 1, 1, 1, 1, 0, 0]], bool),
    )
    counts = [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert rows.predicted().astype(int).tolist() == counts
    # The weight of a prediction stands where it is made, one to the left of what it predicts.
    assert example(rows).loss_weight.array.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
    masked = rows._replace(segment_ids=None)
    assert masked.predicted().astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert example(masked).loss_weight.array.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0]]
    assert rows.loss_mask[0, 0], "the rows were changed"


def test_a_packed_document_has_the_losses_that_it_has_alone(model):
    rows = packed()
    found = np.asarray(losses_of(model, example(rows)))
    for row, of_row in enumerate(DOCUMENTS):
        start = 0
        for document in of_row:
            expected = np.asarray(losses_of(model, alone(document)))[0, :-1]
            here = found[row, start : start + len(document) - 1]
            np.testing.assert_allclose(here, expected, rtol=2e-5, atol=2e-5)
            start += len(document)


def test_packed_rows_have_the_loss_and_gradient_of_their_documents(model):
    (total, weight), gradient = loss_and_gradient(model, example(packed()))
    documents = [document for of_row in DOCUMENTS for document in of_row]
    parts = [loss_and_gradient(model, alone(document)) for document in documents]
    assert float(weight) == sum(len(document) - 1 for document in documents)
    assert float(total) == pytest.approx(sum(float(part[0][0]) for part in parts), rel=1e-5)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part[1] for part in parts))
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_bit_of_a_document_depends_on_its_neighbours(model):
    first, second, third = DOCUMENTS[0]
    found = np.asarray(losses_of(model, example(packed())))
    others = packed([[DRAW.integers(0, 50, 8), second, third], [*DOCUMENTS[1]]])
    again = np.asarray(losses_of(model, example(others)))
    assert (again[0, :7] != found[0, :7]).all()
    np.testing.assert_array_equal(again[0, 9:16], found[0, 9:16])
    np.testing.assert_array_equal(again[1], found[1])
    after = packed([[first, second, third[::-1]], DOCUMENTS[1]])
    again = np.asarray(losses_of(model, example(after)))
    np.testing.assert_array_equal(again[0, :7], found[0, :7])


def test_one_document_that_fills_its_row_is_a_row_without_segments(model):
    tokens = DRAW.integers(0, 50, (2, Pos.size)).astype(np.int32)
    whole = Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool))
    (total, weight), gradient = loss_and_gradient(model, example(whole))
    (bare_total, bare_weight), bare_gradient = loss_and_gradient(model, example(Rows(tokens)))
    assert float(weight) == float(bare_weight)
    assert float(total) == pytest.approx(float(bare_total), rel=1e-6)
    for found, expected in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(bare_gradient), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
