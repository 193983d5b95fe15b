"""Greedy generation against a loop that runs the whole model for every token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import Axis
from modeling.evaluation.generate import Continuation, greedy
from modeling.models.config import Gpt2Config
from modeling.models.lm import build_model

Vocab, Pos = Axis("vocab", 31), Axis("position", 16)
END = 30


@pytest.fixture(scope="module")
def model():
    config = Gpt2Config(hidden_dim=32, num_layers=2, num_heads=4, initializer_range=0.4)
    return build_model(config, Vocab, Pos, key=jax.random.key(7))


def by_hand(model, prompt, num_tokens, end_id):
    """Appends the likeliest token, one forward pass of exactly the tokens so far at a time."""
    tokens = list(prompt)
    while len(tokens) < Pos.size and len(tokens) < len(prompt) + num_tokens:
        row = hax.named(jnp.asarray(tokens, jnp.int32), Pos.resize(len(tokens)))
        tokens.append(int(np.argmax(np.asarray(model(row).array)[-1])))
        if tokens[-1] == end_id:
            return tokens[len(prompt) : -1], "end"
    full = len(tokens) - len(prompt) < num_tokens
    return tokens[len(prompt) :], "context" if full else "limit"


def test_prompts_of_several_lengths_continue_as_each_alone(model):
    prompts = [[1, 2, 3], [5], [9, 8, 7, 6, 5, 4, 3, 2]]
    made = greedy(model, prompts, 6, end_id=END)
    expected = [by_hand(model, prompt, 6, END) for prompt in prompts]
    assert made == [Continuation(tuple(tokens), stopped) for tokens, stopped in expected]
    assert all(len(set(c.tokens)) > 1 for c in made), "the oracle should not be trivial"


def test_a_document_that_ends_stops_and_the_others_go_on(model):
    prompts = [[1, 2, 3], [5]]
    free = greedy(model, prompts, 8, end_id=END)
    end_id = free[0].tokens[3]
    made = greedy(model, prompts, 8, end_id=end_id)
    cut = free[0].tokens.index(end_id)
    assert made[0] == Continuation(free[0].tokens[:cut], "end")
    tokens, stopped = by_hand(model, prompts[1], 8, end_id)
    assert made[1] == Continuation(tuple(tokens), stopped)


def test_generation_stops_where_the_context_is_full(model):
    (made,) = greedy(model, [list(range(12))], 100, end_id=END)
    tokens, stopped = by_hand(model, list(range(12)), 100, END)
    assert stopped == "context"
    assert made == Continuation(tuple(tokens), "context")
    assert len(made.tokens) == 4


def test_the_last_place_may_be_filled_by_the_limit(model):
    (made,) = greedy(model, [list(range(12))], 4, end_id=END)
    assert len(made.tokens) == 4
    assert made.stopped == "limit"


def test_of_equal_logits_the_lowest_id_is_taken(model):
    flat = eqx.tree_at(
        lambda m: m.embeddings.token_embeddings.weight.array, model, jnp.zeros((31, 32))
    )
    (made,) = greedy(flat, [[3]], 2, end_id=END)
    assert made.tokens == (0, 0)


@pytest.mark.parametrize("length", [0, 16, 20])
def test_prompts_without_room_are_refused(model, length):
    with pytest.raises(ValueError, match=f"prompt of {length} tokens.*at most 15"):
        greedy(model, [[1], [0] * length], 4, end_id=END)


def test_no_prompts_give_nothing(model):
    assert greedy(model, [], 4, end_id=END) == []
