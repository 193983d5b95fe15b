# ruff: noqa: E501 - tables read best with one row a line
"""Mistakes teach: each message names the operation, the axes with their sizes, and a way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import nn
from haliax.nn import attention
from haliax.partitioning import pspec_for_axis

B, P, E, K = hax.make_axes(batch=2, position=3, embed=4, key_size=5)
KEY = jax.random.PRNGKey(0)
x = hax.ones((B, P, E))
y = hax.ones((E, K))
ids = hax.zeros((B, P), dtype=jnp.int32)
linear = nn.Linear.init(E, K, key=KEY)


def _lies():
    """What a raw `jax.vmap` makes of a named array: three names for two dimensions."""
    return jax.tree_util.tree_map(lambda a: a[0], x)


XYZ = r"\{'batch': 2, 'position': 3, 'embed': 4\}"

# name: (type, mistake, what the message must say)
MISTAKES = {
    # construction
    "named: too few names": (ValueError, lambda: hax.named(jnp.ones((2, 3)), "a"), r"named: .*\(2, 3\).*'a'.*one name per dimension"),
    "constructor: names only": (TypeError, lambda: hax.NamedArray(jnp.ones(2), "a"), "'a'.*hax.named"),
    "constructor: wrong size": (ValueError, lambda: hax.NamedArray(jnp.ones((2, 4)), (B, P)), "Shape mismatch.*'position' has size 3.*size 4.*hax.named"),
    "constructor: wrong rank": (ValueError, lambda: hax.NamedArray(jnp.ones(2), (B, P)), "Shape mismatch.*one axis per dimension"),
    "constructor: repeated axis": (ValueError, lambda: hax.NamedArray(jnp.ones((2, 2)), (B, B)), "Axes must be unique.*'batch'.*rename"),
    "axis: negative size": (ValueError, lambda: hax.Axis("a", -1), "'a' has negative size -1"),
    "scalar of an array": (ValueError, lambda: float(x), f"scalar.*{XYZ}.*sum"),
    # elementwise and broadcasting
    "add: overlap": (ValueError, lambda: x + y, f"`add`: cannot broadcast {XYZ} with .*'key_size': 5.*no subset.*broadcast_axis"),
    "add: size clash": (ValueError, lambda: x + hax.ones(P.resize(7)), "`add`.*'position' has size 3 on one side and 7.*[Ss]lice"),
    "add: typo": (ValueError, lambda: x + hax.ones(hax.Axis("positoin", 3)), "`add`.*Did you mean 'position'"),
    "add: unnamed array": (ValueError, lambda: x + jnp.ones(4), f"`add`.*{XYZ}.*unnamed.*\\(4,\\).*hax.named"),
    "add: numpy array": (ValueError, lambda: np.ones(4, np.float32) + x, "`add`.*unnamed.*hax.named"),
    "maximum: overlap": (ValueError, lambda: hax.maximum(x, y), "maximum: cannot broadcast"),
    "matmul": (ValueError, lambda: x @ y, r"`@`.*hax\.dot\(a, b, axis="),
    "compare with None": (ValueError, lambda: x == None, "`==`.*None.*is None"),  # noqa: E711
    "where: overlap": (ValueError, lambda: hax.where(x > 0, y, 0.0), "where: cannot broadcast"),
    "where: half a choice": (ValueError, lambda: hax.where(x > 0, y), "where: pass both x and y"),
    "clip: does not fit": (ValueError, lambda: hax.clip(x, y, 1.0), "clip: cannot broadcast"),
    "broadcast_to: new axis without size": (ValueError, lambda: x.broadcast_to(("batch", "position", "embed", "new")), r"broadcast_to: axis 'new' not found in .*Axis\('new', size\)"),
    "broadcast_to: extra axes": (ValueError, lambda: x.broadcast_to((B, P)), "broadcast_to.*'embed'.*broadcast_axis"),
    "broadcast_to: size clash": (ValueError, lambda: x.broadcast_axis(P.resize(9)), "broadcast_to: axis 'position' has size 3.*size 9"),
    # reductions and functions along an axis
    "sum: typo": (ValueError, lambda: x.sum("embde"), f"sum: axis 'embde' not found in {XYZ}. Did you mean 'embed'"),
    "sum: wrong case": (ValueError, lambda: x.sum("Embed"), "sum: .*Did you mean 'embed'"),
    "sum: size clash": (ValueError, lambda: x.sum(E.resize(9)), f"sum: axis 'embed' has size 4 in {XYZ}.*size 9.*'embed'"),
    "sum: axis twice": (ValueError, lambda: x.sum(("embed", E)), "sum: .*'embed' occurs more than once.*once"),
    "sum: unnamed where": (TypeError, lambda: x.sum(where=jnp.ones(4, bool)), "sum: `where` must be a NamedArray.*hax.named"),
    "sum: where with other axes": (ValueError, lambda: x.sum(where=y > 0), r"sum\(where=\): cannot broadcast"),
    "argmax: two axes": (ValueError, lambda: x.argmax(("batch", "embed")), "argmax works along one axis.*flatten_axes"),
    "cumsum: two axes": (ValueError, lambda: hax.cumsum(x, (B, P)), "cumsum works along one axis"),
    "softmax: typo": (ValueError, lambda: nn.softmax(x, "pos"), "softmax: axis 'pos' not found.*Did you mean 'position'"),
    "top_k: too many": (ValueError, lambda: x.top_k("embed", 9), r"top_k: k=9 does not fit axis embed\(4\)"),
    "top_k: wrong new axis": (ValueError, lambda: x.top_k("embed", 2, hax.Axis("best", 3)), r"top_k: .*best\(3\) must have size k=2"),
    # contraction
    "dot: absent everywhere": (ValueError, lambda: hax.dot(x, y, axis="emb"), "dot: axis 'emb' not found in .*Did you mean 'embed'"),
    "dot: size clash": (ValueError, lambda: hax.dot(x, hax.ones((E.resize(6), K)), axis="embed"), r"dot: axis 'embed' has size 4 in one operand and size 6 in another: \{.*\} and \{.*\}.*rename"),
    "dot: axis of another size": (ValueError, lambda: hax.dot(x, y, axis=E.resize(9)), "dot: axis 'embed' has size 4.*size 9"),
    "dot: no axis": (TypeError, lambda: hax.dot(x, y), r"dot: say what to sum over"),
    "dot: plain array": (TypeError, lambda: hax.dot(x, jnp.ones(4), axis=E), r"dot: .*NamedArray.*hax\.named"),
    "dot: out_axes": (ValueError, lambda: hax.dot(x, y, axis=E, out_axes=("key_size", "batch")), r"dot\(out_axes=\).*'position'.*`\.\.\.`"),
    "einsum: unknown axis": (ValueError, lambda: hax.einsum("{embd} -> ...", x, y), "einsum: 'embd' is not an axis.*Did you mean 'embed'"),
    "einsum: letters against names": (ValueError, lambda: hax.einsum("b p e, d k -> b k", x, y), "einsum: 'e' and 'd' both stand for the axis 'embed'"),
    "einsum: one letter, two names": (ValueError, lambda: hax.einsum("b p e, b e -> p", x, y), "einsum: 'b' stands for batch.2. and for embed.4..*one letter.*rename"),
    "einsum: rank": (ValueError, lambda: hax.einsum("b e, e k -> b k", x, y), f"einsum: 2 letters for an array with axes {XYZ}"),
    "einsum: unused alias": (ValueError, lambda: hax.einsum("{embed} -> ...", x, y, q="batch"), r"einsum: the aliases \['q'\] are not used"),
    # shapes
    "rearrange: missing axis": (ValueError, lambda: x.rearrange(("embed", "batch")), f"rearrange: .*'position'.*{XYZ}.*`\\.\\.\\.`"),
    "rearrange: typo": (ValueError, lambda: x.rearrange(("embd", ...)), "rearrange: axis 'embd' not found.*Did you mean 'embed'"),
    "rearrange: wrong size": (ValueError, lambda: x.rearrange((E.resize(9), ...)), "rearrange: axis 'embed' has size 4.*size 9"),
    "rearrange: twice": (ValueError, lambda: x.rearrange(("embed", "embed", ...)), "rearrange: .*'embed' occurs more than once"),
    "rearrange: dropped by string": (ValueError, lambda: hax.rearrange(x, "b p e -> b e"), "rearrange: 'p' is on the left but not on the right.*reduce"),
    "rearrange: unnamed merge": (ValueError, lambda: hax.rearrange(x, "b p e -> b (p e)"), r"merged axis needs a name.*\(pixels: h w\)"),
    "rearrange: uneven split": (ValueError, lambda: hax.rearrange(x, "b p (h d) -> b p h d", h=3), r"rearrange: embed\(4\) cannot be split into"),
    "rearrange: count": (ValueError, lambda: hax.rearrange(x, "b e -> e b"), f"2 items for the 3 axes of {XYZ}"),
    "rename: unknown": (ValueError, lambda: x.rename({"embd": "e"}), "rename: axis 'embd' not found.*'e'.*Did you mean 'embed'"),
    "rename: collision": (ValueError, lambda: x.rename({"embed": "batch"}), "rename: Axes must be unique.*'batch'.*same call"),
    "rename: size": (ValueError, lambda: x.rename({"embed": E.resize(9).alias("e")}), "rename: axis 'embed' has size 4.*size 9"),
    "flatten_axes: wrong size": (ValueError, lambda: x.flatten_axes(("batch", "embed"), hax.Axis("be", 9)), "flatten_axes: .*8 elements.*'be' has size 9.*'be' alone"),
    "unflatten_axis: product": (ValueError, lambda: x.unflatten_axis("embed", {"h": 3, "d": 2}), r"unflatten_axis: embed\(4\) has 4 elements.*has 6"),
    "unflatten_axis: two unknown": (ValueError, lambda: x.unflatten_axis("embed", ("h", "d")), r"unflatten_axis: cannot find the sizes of \['h', 'd'\]"),
    "split: sizes": (ValueError, lambda: x.split("embed", [E.resize(1), E.resize(2)]), r"split: the sizes of .* add up to 3, but embed\(4\)"),
    "stack: different axes": (ValueError, lambda: hax.stack("new", [x, y]), "stack: the arrays must have the same axes"),
    "stack: axis is there": (ValueError, lambda: hax.stack("batch", [x, x]), "stack: .*'batch'.*concatenate"),
    "stack: nothing": (ValueError, lambda: hax.stack("new", []), "stack: there is nothing to stack along 'new'"),
    "concatenate: other axes differ": (ValueError, lambda: hax.concatenate("embed", [x, y]), "concatenate: all axes but 'embed' must agree"),
    "concatenate: absent": (ValueError, lambda: hax.concatenate("embd", [x, x]), "concatenate: axis 'embd' not found.*Did you mean 'embed'"),
    "roll: array of shifts": (TypeError, lambda: x.roll(ids, "embed"), "roll: shift .*'batch'.*hax.vmap"),
    "pad: negative": (ValueError, lambda: x.pad({"embed": (-1, 0)}), r"pad: axis 'embed' .*\(-1, 0\).*slice"),
    "pad_left: smaller": (ValueError, lambda: x.pad_left("embed", E.resize(2)), r"pad_left: embed\(2\) is smaller than embed\(4\).*slice"),
    "tril: one axis twice": (ValueError, lambda: x.tril("embed", E), "tril: the two axes must be distinct.*'embed'"),
    # indexing
    "index: typo": (ValueError, lambda: x["embd", 0], "index: axis 'embd' not found.*Did you mean 'embed'"),
    "index: no name": (ValueError, lambda: x[0], r"index: name the axis .*x\['batch', 0\].*got 0"),
    "index: out of bounds": (IndexError, lambda: x["embed", 4], "index: 4 is out of bounds for axis 'embed' of size 4"),
    "index: size clash": (RuntimeError, lambda: x[E.resize(9), 0], "index: .*'embed' has size 4.*size 9"),
    "index: axis twice": (ValueError, lambda: x["embed", 0, E, 1], "index: axis 'embed' is indexed twice"),
    "index: 2-d plain array": (ValueError, lambda: x["embed", jnp.zeros((2, 2), jnp.int32)], r"index: axis 'embed' cannot be indexed by an unnamed int32 array of shape \(2, 2\).*hax\.named"),
    "index: floats": (ValueError, lambda: x["embed", 1.5], "index: axis 'embed' cannot be indexed by float 1.5"),
    "index: traced slice": (ValueError, lambda: jax.jit(lambda i: x["embed", i : i + 2])(1), r"index: .*traced bounds.*hax\.ds"),
    "index: pairs of other sizes": (ValueError, lambda: x["embed", hax.zeros(B.resize(7), dtype=jnp.int32)], "index: axis 'batch' has size 2 in the array and 7 in the index"),
    "at: update with other axes": (ValueError, lambda: x.at["embed", 0].set(y), r"at\[\.\.\.\]\.set: the update has axes .*'key_size': 5.*'batch': 2, 'position': 3"),
    "at: unnamed update": (ValueError, lambda: x.at["embed", 0].add(jnp.ones(3)), r"at\[\.\.\.\]\.add: an unnamed update.*hax\.named"),
    "take: typo": (ValueError, lambda: x.take("embd", 0), "take: axis 'embd' not found.*Did you mean 'embed'"),
    "slice: no length": (ValueError, lambda: x.slice("embed", start=1), "slice: say how long"),
    "slice: too long": (ValueError, lambda: x.slice({"embed": 2}, {"embed": 3}), r"slice: 3 elements from 2 do not fit axis embed\(4\)"),
    "updated_slice: foreign axis": (ValueError, lambda: x.updated_slice({"embed": 0}, y), "updated_slice: .*not in the original array with shape.*'key_size'"),
    "updated_slice: too long": (ValueError, lambda: x.updated_slice({"embed": 3}, hax.ones(E.resize(2))), r"updated_slice: 2 elements from 3 do not fit axis embed\(4\)"),
    # higher order
    "vmap: no such axis": (ValueError, lambda: hax.vmap(lambda a: a, "heads")(x), r"vmap: no argument has the axis 'heads'.*Axis\('heads', size\)"),
    "vmap: size clash": (ValueError, lambda: hax.vmap(lambda a: a, B.resize(9))(x), "vmap: the axis 'batch' has size 9, but a has axes .*'batch': 2"),
    "scan: no pair": (ValueError, lambda: hax.scan(lambda c, a: c, B)(0.0, x), r"scan: .*\(carry, output\).*hax\.fold"),
    "scan: carry changes axes": (ValueError, lambda: hax.fold(lambda c, a: c + a, B)(hax.zeros(E), x), "scan: the carry must keep its axes, but .*'embed': 4.* came out as .*'position': 3.*Broadcast"),
    "scan: carry changes type": (ValueError, lambda: hax.fold(lambda c, a: jnp.zeros(4), B)(hax.zeros(E), x), "scan: the carry must keep its type"),
    "raw vmap: sum": (ValueError, lambda: _lies().sum("embed"), r"sum: the array has shape \(3, 4\), but its axes are .*hax\.vmap"),
    "raw vmap: dot": (ValueError, lambda: hax.dot(_lies(), y, axis=E), r"dot: the array has shape \(3, 4\).*hax\.vmap"),
    "raw vmap: index": (ValueError, lambda: _lies()["embed", 0], r"index: the array has shape.*hax\.vmap"),
    # layers
    "Linear: input lacks In": (ValueError, lambda: linear(hax.ones((B, P))), r"Linear: the input axis embed\(4\) is not in \{'batch': 2, 'position': 3\}; this layer maps .*'key_size': 5"),
    "Linear: wrong size": (ValueError, lambda: linear(hax.ones((B, E.resize(6)))), r"Linear: the input axis embed\(4\) is not in \{'batch': 2, 'embed': 6\}"),
    "Linear: In meets Out": (ValueError, lambda: nn.Linear.init((B, E), (E, K), key=KEY), r"Linear: \['embed'\] is in both In .* and Out .*alias"),
    "LayerNorm: absent axis": (ValueError, lambda: nn.LayerNorm.init(K)(x), f"LayerNorm: the axis key_size\\(5\\) .*{XYZ}"),
    "Embedding: floats": (TypeError, lambda: nn.Embedding.init(hax.Axis("v", 9), E, key=KEY)(x), "Embedding: token ids are integers, not float32"),
    "Dropout: no key": (RuntimeError, lambda: nn.Dropout(0.5)(x), "`key`.*inference"),
    "loss: no Label": (ValueError, lambda: nn.cross_entropy_loss(x, "vocab", ids), "cross_entropy_loss: axis 'vocab' not found"),
    "loss: float targets": (ValueError, lambda: nn.cross_entropy_loss(x, "embed", ids.astype(jnp.float32)), "cross_entropy_loss: targets .* neither class numbers.*nor distributions over embed"),
    "loss: foreign targets": (ValueError, lambda: nn.cross_entropy_loss(x, "embed", hax.zeros(K, dtype=jnp.int32)), "cross_entropy_loss: targets with axes .*'key_size': 5.*'batch': 2, 'position': 3"),
    "attention: same positions": (ValueError, lambda: attention.dot_product_attention(P, E, x, x, x), "attention: query positions and key positions must be distinct, but 'position'.*key.rename"),
    "attention: no KPos": (ValueError, lambda: attention.dot_product_attention("keys", E, x, x, x), r"attention \(value\): axis 'keys' not found"),
    "attention: no Key": (ValueError, lambda: attention.dot_product_attention_weights("heads", "position", x, x), r"attention \(query\): axis 'heads' not found"),
    "Conv: no channel": (ValueError, lambda: nn.Conv.init("position", K, K, 2, key=KEY)(x), "Conv: axis 'key_size' not found"),
    "pool: no axis": (ValueError, lambda: nn.max_pool(K, x), "max_pool: axis 'key_size' not found"),
    "glu: odd": (ValueError, lambda: nn.glu(x, "position"), r"glu: axis position\(3\) .* even"),
    "fft: no axis": (ValueError, lambda: hax.fft.fft(x, "embd"), "fft: axis 'embd' not found.*Did you mean 'embed'"),
    # randomness and placement
    "random: unnamed parameter": (ValueError, lambda: hax.random.uniform(KEY, x.axes, minval=jnp.ones(4)), "random.uniform: an unnamed parameter.*hax.named"),
    "random: foreign parameter": (ValueError, lambda: hax.random.bernoulli(KEY, B, y), "random.bernoulli: a parameter with axes .*'key_size': 5.*'batch': 2"),
    "random: categorical": (ValueError, lambda: hax.random.categorical(KEY, x, "embd"), "random.categorical: axis 'embd' not found"),
    "mapping: one mesh axis twice": (ValueError, lambda: pspec_for_axis(x.axes, {"batch": "data", "embed": "data"}), "'batch' and 'embed' .* both mapped to the mesh axis 'data'"),
    "sharding: no mesh": (ValueError, lambda: hax.sharding_for_axis(B, {"batch": "data"}), "sharding_for_axis: there is no mesh.*set_mesh"),
}  # fmt: skip


def test_there_are_enough_of_them():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_teach(name):
    kind, mistake, message = MISTAKES[name]
    with pytest.raises(kind) as caught:
        mistake()
    text = str(caught.value)
    assert re.search(message, text, re.DOTALL), text
    assert "TypeCheckError" not in type(caught.value).__name__
    assert text.count("\n") <= 4
