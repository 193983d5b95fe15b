# ruff: noqa: E501 - tables read best with one row a line
"""Rearranging, renaming, grouping, joining and cutting, by sequence and by string."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax

B, H, W, C = hax.make_axes(B=2, H=4, W=6, C=3)
X = np.arange(144, dtype=np.float32).reshape(2, 4, 6, 3)


def _x():
    return hax.named(X, (B, H, W, C))


def _is(found, axes, expected):
    assert " ".join(f"{a.name}{a.size}" for a in found.axes) == axes
    np.testing.assert_array_equal(found.array, expected)


def test_rearrange_by_sequence():
    _is(_x().rearrange(("C", ..., "B")), "C3 H4 W6 B2", X.transpose(3, 1, 2, 0))
    _is(hax.rearrange(_x(), (W, C, B, H)), "W6 C3 B2 H4", X.transpose(2, 3, 0, 1))


@pytest.mark.parametrize(
    ("pattern", "bindings", "axes", "expected"),
    [
        ("b h w c -> c b h w", {}, "C3 B2 H4 W6", X.transpose(3, 0, 1, 2)),
        ("b h w c -> b (e: h w c)", {}, "B2 e72", X.reshape(2, 72)),
        ("b h w c -> b (e: c w h)", {"e": "embed"}, "B2 embed72", X.transpose(0, 3, 2, 1).reshape(2, 72)),
        ("b ... c -> c ... b", {}, "C3 H4 W6 B2", X.transpose(3, 1, 2, 0)),
        ("{H W} -> ... W H", {}, "B2 C3 W6 H4", X.transpose(0, 3, 2, 1)),
        ("{W, C} -> C ... W", {}, "C3 B2 H4 W6", X.transpose(3, 0, 1, 2)),
        ("{C} -> ... C ...", {}, "B2 H4 W6 C3", X),
        (
            "b (h p) (w q) c -> b h w (patch: p q c)",
            {"p": 2, "q": 3},
            "B2 h2 w2 patch18",
            X.reshape(2, 2, 2, 2, 3, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 2, 18),
        ),
        ("{(H: a b)} -> b a ...", {"a": hax.Axis("top", 2)}, "b2 top2 B2 W6 C3", X.reshape(2, 2, 2, 6, 3).transpose(2, 1, 0, 3, 4)),
        ("{h} -> h ...", {"h": "H"}, "H4 B2 W6 C3", X.transpose(1, 0, 2, 3)),
        ("{'H' \"W\"} -> (HW: H W) ...", {}, "HW24 B2 C3", X.transpose(1, 2, 0, 3).reshape(24, 2, 3)),
        ("b h w c -> b h w c (one:)", {}, "B2 H4 W6 C3 one1", X[..., None]),
        ("b h w (a c) -> a b h w c", {"a": 1}, "a1 B2 H4 W6 c3", X[None]),
    ],
)  # fmt: skip
def test_rearrange_by_string(pattern, bindings, axes, expected):
    _is(hax.rearrange(_x(), pattern, **bindings), axes, expected)


def test_a_pattern_error_shows_the_place():
    with pytest.raises(ValueError, match=r"Error while parsing:\n    b h\? w\n       \^"):
        hax.rearrange(_x(), "b h? w")


def test_rename_swaps_at_once():
    _is(_x().rename({"H": "W", W: "H"}), "B2 W4 H6 C3", X)


def test_flatten_axes_puts_the_new_axis_at_the_first_old_one():
    _is(_x().flatten_axes(("H", "W"), "P"), "B2 P24 C3", X.reshape(2, 24, 3))
    _is(_x().flatten_axes(("C", "B"), "P"), "P6 H4 W6", X.transpose(3, 0, 1, 2).reshape(6, 4, 6))
    _is(_x().flatten_axes((), "P"), "P1 B2 H4 W6 C3", X[None])
    assert hax.flatten_axes((B, H, W), (H, W), "P") == (B, hax.Axis("P", 24))
    assert hax.flatten_axes({"B": 2, "H": 4}, ("B", "H"), "P") == {"P": 8}


def test_unflatten_is_the_inverse_and_infers_one_size():
    flat = _x().flatten_axes(("H", "W"), "P")
    _is(flat.unflatten_axis("P", (H, W)), "B2 H4 W6 C3", X)
    _is(flat.unflatten_axis("P", {"H": None, "W": 6}), "B2 H4 W6 C3", X)
    _is(_x().flatten_axes((), "P").unflatten_axis("P", ()), "B2 H4 W6 C3", X)


def test_ravel():
    _is(_x().ravel("all"), "all144", X.ravel())
    _is(_x().flatten("all"), "all144", X.ravel())


def test_split_and_concatenate():
    L, R = hax.Axis("W", 2), hax.Axis("right", 4)
    left, right = _x().split("W", [L, R])
    _is(left, "B2 H4 W2 C3", X[:, :, :2])
    _is(right, "B2 H4 right4 C3", X[:, :, 2:])
    back = hax.concatenate("W", [left, right.rename({"right": "W"}).rearrange(("C", ...))])
    _is(back, "B2 H4 W6 C3", X)


def test_stack_and_unbind():
    parts = _x().unbind("W")
    assert len(parts) == 6
    _is(parts[1], "B2 H4 C3", X[:, :, 1])
    again = hax.stack("W", [parts[0], *(p.rearrange(("C", ...)) for p in parts[1:])])
    _is(again, "W6 B2 H4 C3", np.moveaxis(X, 2, 0))


def test_repeat_and_tile():
    _is(_x().repeat(2, "C"), "B2 H4 W6 C6", X.repeat(2, 3))
    counts = hax.named([1, 0, 2], "C")
    _is(_x().repeat(counts, "C", total_repeat_length=3), "B2 H4 W6 C3", X.repeat([1, 0, 2], 3))
    _is(_x().tile({"C": 2, "N": 3}), "N3 B2 H4 W6 C6", np.tile(X, (3, 1, 1, 1, 2)))


def test_roll_by_numbers_and_arrays():
    _is(_x().roll(1, "W"), "B2 H4 W6 C3", np.roll(X, 1, 2))
    _is(_x().roll((1, 2), ("W", "H")), "B2 H4 W6 C3", np.roll(X, (1, 2), (2, 1)))
    _is(_x().roll(hax.named(jnp.array(-2), ()), "W"), "B2 H4 W6 C3", np.roll(X, -2, 2))
    _is(jax.jit(lambda s: _x().roll(s, ("H", "W")))(3), "B2 H4 W6 C3", np.roll(X, 3, (1, 2)))


def test_pad():
    widths = [(0, 0), (1, 2), (0, 0), (0, 0)]
    _is(_x().pad({"H": (1, 2)}), "B2 H7 W6 C3", np.pad(X, widths))
    _is(
        _x().pad({"H": (1, 2)}, constant_values=5.0),
        "B2 H7 W6 C3",
        np.pad(X, widths, constant_values=5),
    )
    _is(_x().pad({H: (1, 2)}, mode="reflect"), "B2 H7 W6 C3", np.pad(X, widths, mode="reflect"))
    left = np.pad(X, [(0, 0), (0, 0), (2, 0), (0, 0)], constant_values=-1)
    _is(_x().pad_left("W", hax.Axis("V", 8), -1.0), "B2 H4 V8 C3", left)
