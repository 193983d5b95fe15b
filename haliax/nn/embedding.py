"""`Embedding`: a table of one vector per token, read by `embed` and multiplied by `unembed`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from haliax import random
from haliax.axis import Axis, AxisSpec, axis_names, axis_size, axis_spec_to_tuple, concat_axes
from haliax.contraction import dot
from haliax.core import NamedArray
from haliax.indexing import slice, take
from haliax.jax_utils import named_call
from haliax.shapes import concatenate
from haliax.state_dict import ModuleWithStateDictSerialization


class Embedding(ModuleWithStateDictSerialization):
    """A vector over the axes `Embed` for each position of `Vocab`."""

    weight: NamedArray
    Vocab: Axis = eqx.field(static=True)
    Embed: AxisSpec = eqx.field(static=True)

    @staticmethod
    def init(Vocab: Axis, Embed: AxisSpec, *, init_scale: float = 1.0, key: Any) -> "Embedding":
        """Truncated normal vectors of scale `init_scale / size of Embed`."""
        axes = concat_axes((Vocab,), axis_spec_to_tuple(Embed))
        weight = random.truncated_normal(key, axes, -3, 3) * (init_scale / axis_size(Embed))
        return Embedding(weight, Vocab, Embed)

    def __call__(self, input_ids: NamedArray, *, key: Any = None) -> NamedArray:
        """`embed`."""
        del key
        return self.embed(input_ids)

    @named_call
    def embed(self, input_ids: NamedArray) -> NamedArray:
        """The vectors of token ids: the axes of the ids, then `Embed`."""
        if not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise TypeError(
                f"Embedding: token ids are integers, not {input_ids.dtype}. For a distribution "
                "over tokens, use `hax.dot(probs, embedding.weight, axis=Vocab)`."
            )
        # The gradient of a gather is a sum over all uses of a token. In bfloat16 it would stop
        # growing after some hundred uses; going there and back through float32 changes no vector.
        dtype = self.weight.dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            return take(self.weight.astype(jnp.float32), self.Vocab, input_ids).astype(dtype)
        return take(self.weight, self.Vocab, input_ids)

    @named_call
    def unembed(self, input_embeds: NamedArray) -> NamedArray:
        """The dot products of vectors with every row: `Embed` becomes `Vocab`."""
        return dot(input_embeds, self.weight, axis=axis_names(self.Embed))

    def resize_embeddings(self, new_size: int, key: Any = None) -> "Embedding":
        """The table cut or grown to a number of rows; new ones are random, or the mean row.

        Without a key, new rows are the mean of the old: no token then gets an outlying logit.
        """
        NewVocab = self.Vocab.resize(new_size)
        if new_size <= self.Vocab.size:
            weight = slice(self.weight, self.Vocab, NewVocab)
        else:
            Extra = self.Vocab.resize(new_size - self.Vocab.size)
            rows = self.weight.mean(self.Vocab).broadcast_axis(Extra)
            if key is not None:
                shape = concat_axes((Extra,), axis_spec_to_tuple(self.Embed))
                rows = random.truncated_normal(key, shape, -3, 3) * self.weight.std()
            weight = concatenate(NewVocab, [self.weight, rows.astype(self.weight.dtype)])
        return Embedding(weight, NewVocab, self.Embed)
