"""Axis arithmetic: helpers answer in the spelling they were given; size clashes are errors."""

import pytest

import haliax as hax
from haliax.axis import Axis, rearrange_for_partial_order

H, W, D, C = hax.make_axes(H=2, W=3, D=4, C=5)


def test_axis_is_a_value():
    assert Axis("H", 2) == H
    assert Axis("H", 3) != H
    assert Axis("Q", 2) != H
    assert len({H, Axis("H", 2), W}) == 2
    assert H != "H"


def test_axis_prints_as_code_and_as_text():
    assert repr(H) == "Axis(name='H', size=2)"
    assert str(H) == "H(2)"


def test_alias_and_resize_make_new_axes():
    assert H.alias("Q") == Axis("Q", 2)
    assert H.resize(7) == Axis("H", 7)
    assert Axis("H", 2) == H


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="negative size -1"):
        Axis("H", -1)


@pytest.mark.parametrize(
    ("spec", "names"),
    [(H, "H"), ("H", "H"), ((H, "W"), ("H", "W")), ({"H": 2, "W": None}, ("H", "W"))],
)
def test_axis_name(spec, names):
    assert hax.axis_name(spec) == names


@pytest.mark.parametrize(("spec", "size"), [(H, 2), ((H, W), 6), ({"H": 2, "D": 4}, 8), ((), 1)])
def test_axis_size_is_the_product(spec, size):
    assert hax.axis_size(spec) == size


@pytest.mark.parametrize(
    ("function", "first", "second", "expected"),
    [
        (hax.concat_axes, (H, W), D, (H, W, D)),
        (hax.concat_axes, {"H": 2}, {"W": 3}, {"H": 2, "W": 3}),
        (hax.union_axes, (H, W), (W, D), (H, W, D)),
        (hax.union_axes, {"H": 2}, (H, D), {"H": 2, "D": 4}),
        (hax.union_axes, H, {"W": 3}, (H, W)),
        (hax.intersect_axes, (H, W, D), (D, H), (H, D)),
        (hax.intersect_axes, {"H": 2, "W": 3}, ("W",), {"W": 3}),
        (hax.eliminate_axes, (H, W, D), ("W",), (H, D)),
        (hax.eliminate_axes, {"H": 2, "W": 3}, H, {"W": 3}),
        (hax.without_axes, (H, W), (D, "W"), (H,)),
    ],
)
def test_set_arithmetic(function, first, second, expected):
    answer = function(first, second)
    assert answer == expected
    assert type(answer) is type(expected)


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [
        (hax.concat_axes, (H, W), (W,)),
        (hax.union_axes, (H, W), (H.resize(9),)),
        (hax.intersect_axes, (H, W), (H.resize(9),)),
        (hax.eliminate_axes, (H, W), (D,)),
        (hax.eliminate_axes, (H, W), (H.resize(9),)),
        (hax.without_axes, (H, W), (H.resize(9),)),
    ],
)
def test_clashes_are_value_errors(function, first, second):
    with pytest.raises(ValueError, match=r"H|W|D"):
        function(first, second)


def test_without_axes_may_ignore_sizes():
    assert hax.without_axes((H, W), H.resize(9), allow_mismatched_sizes=True) == (W,)


def test_replace_axis():
    assert hax.replace_axis((H, W), "H", (D, C)) == (D, C, W)
    assert hax.replace_axis({"H": 2, "W": 3}, H, {"Q": 2}) == {"Q": 2, "W": 3}
    with pytest.raises(ValueError, match="not found"):
        hax.replace_axis((H, W), D, C)
    with pytest.raises(ValueError, match="unique"):
        hax.replace_axis((H, W), H, W)


def test_resolve_axis_answers_in_the_spelling_of_the_selection():
    assert hax.resolve_axis((H, W), "W") == W
    assert hax.resolve_axis({"H": 2, "W": 3}, ("W", H)) == (W, H)
    assert hax.resolve_axis((H, W), {"W": None}) == {"W": 3}
    with pytest.raises(ValueError, match="size 9"):
        hax.resolve_axis((H, W), W.resize(9))


def test_selects_axis_lets_unsized_match_any_size():
    assert hax.selects_axis(("H", W), (H, W))
    assert hax.selects_axis((H, W), "H")
    assert not hax.selects_axis((H, W), (H, D))
    assert not hax.selects_axis(H, H.resize(9))
    assert hax.selects_axis({"H": None, "W": 3}, {"H": 2})


def test_unsize_axes():
    assert hax.unsize_axes((H, W)) == ("H", "W")
    assert hax.unsize_axes((H, W), "W") == (H, "W")
    assert hax.unsize_axes({"H": 2, "W": 3}) == {"H": None, "W": None}
    assert hax.unsize_axes(H) == "H"


def test_specs_convert():
    assert hax.axis_spec_to_shape_dict((H, W)) == {"H": 2, "W": 3}
    assert hax.axis_spec_to_tuple({"H": 2, "W": 3}) == (H, W)
    assert hax.to_jax_shape({"H": 2, "W": 3}) == (2, 3)


def test_compatible_means_same_name():
    assert hax.is_axis_compatible(H, "H")
    assert hax.is_axis_compatible(H, H.resize(9))
    assert not hax.is_axis_compatible(H, W)


HWDC = (H, W, D, C)
FRUIT = hax.make_axes(banana=1, orange=2, cherry=3, apple=4, grape=5)


@pytest.mark.parametrize(
    ("order", "axes", "expected"),
    [
        (("C", ..., ...), HWDC, "C H W D"),
        ((..., "C", ..., "W"), HWDC, "H D C W"),
        (("D", ..., "H", ...), (H, W, D, C), "D H W C"),
        (("D", ..., "H", ...), (W, D, H, C), "D W H C"),
        (("C", "D", "W", "H"), HWDC, "C D W H"),
        ((...,), HWDC, "H W D C"),
        (
            ("apple", ..., "banana", ..., "cherry", ...),
            FRUIT,
            "apple banana orange cherry grape",
        ),
    ],
)
def test_partial_orders(order, axes, expected):
    found = rearrange_for_partial_order(order, axes)
    assert " ".join(axis.name for axis in found) == expected


@pytest.mark.parametrize(
    "order", [("C",), ("C", "C", ...), ("Q", ...), (C.resize(9), ...), ("H", "W", "D")]
)
def test_impossible_partial_orders(order):
    with pytest.raises(ValueError, match="rearrange"):
        rearrange_for_partial_order(order, HWDC)
