"""Identity's pitfalls: what must differ differs, what must not does not, the bytes are frozen."""

import dataclasses
import math
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.canonical import NOT_IDENTITY, added_later, digest, encode, plain


@dataclasses.dataclass(frozen=True)
class Sgd:
    lr: float = 0.1
    identity_tag: ClassVar[str] = "test.sgd/1"


@dataclasses.dataclass(frozen=True)
class Adam:
    lr: float = 0.1
    identity_tag: ClassVar[str] = "test.adam/1"


@dataclasses.dataclass(frozen=True)
class SgdWithMomentum:
    """`Sgd` as it would look after a field was added, under the same tag."""

    lr: float = 0.1
    momentum: float = dataclasses.field(default=0.0, metadata=added_later(0.0))
    log_dir: str = dataclasses.field(default="logs", metadata=NOT_IDENTITY)
    identity_tag: ClassVar[str] = "test.sgd/1"


@dataclasses.dataclass(frozen=True)
class Untagged:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class TaggedByParentOnly(Sgd):
    nesterov: bool = False


class TestWhatDiffers:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (1, 1.0),
            (0, False),
            (1, True),
            (0.0, -0.0),
            ("1", 1),
            (b"a", "a"),
            (None, ""),
            ([], ()),
            ([1, [2]], [1, 2]),
            ({"a": None}, {}),
            ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
            (["12", "3"], ["1", "23"]),
            (("12", "3"), ("1", "23")),
            (["a", 1], ("a", 1)),
            ({"a": {"b": 1}}, {"a.b": 1}),
            ({"a": "12", "b": "3"}, {"a": "1", "b": "23"}),
            (2**53, 2**53 + 1),
            (Sgd(), Adam()),
            (Sgd(0.1), Sgd(0.2)),
            (SgdWithMomentum(momentum=0.9), SgdWithMomentum()),
        ],
    )
    def test_two_values_have_two_encodings(self, one: Any, other: Any):
        assert encode(one) != encode(other)
        assert digest("test", one) != digest("test", other)

    def test_domains_do_not_share_digests(self):
        assert digest("recipe", [1]) != digest("content", [1])


class TestWhatDoesNot:
    def test_key_order_does_not_count(self):
        assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})

    def test_composed_and_decomposed_letters_are_one_text(self):
        assert encode("caf\u00e9") == encode("cafe\u0301")

    def test_a_new_field_at_its_old_default_keeps_old_identities(self):
        assert encode(SgdWithMomentum()) == encode(Sgd())

    def test_fields_that_cannot_change_results_do_not_count(self):
        assert encode(SgdWithMomentum(log_dir="elsewhere")) == encode(Sgd())

    def test_a_default_written_out_is_the_default(self):
        assert encode(Sgd(lr=0.1)) == encode(Sgd())


class TestWhatIsRefused:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_that_equal_nothing_or_hide_an_overflow(self, value: float):
        with pytest.raises(ValueError, match=r"\$\.lr\[1\]"):
            encode({"lr": [0.0, value]})

    @pytest.mark.parametrize(
        "value", [object(), {1, 2}, 1j, len, Untagged(), TaggedByParentOnly(), Sgd]
    )
    def test_values_without_one_obvious_form(self, value: Any):
        with pytest.raises(TypeError, match=r"\$\.model"):
            encode({"model": value})

    def test_keys_that_are_not_texts(self):
        with pytest.raises(TypeError, match="string keys"):
            encode({1: "a"})

    def test_keys_that_collide_after_normalization(self):
        with pytest.raises(ValueError, match="NFC"):
            encode({"caf\u00e9": 1, "cafe\u0301": 2})


def test_encodings_are_frozen():
    value = {"model": Sgd(0.25), "steps": 300, "mesh": {"data": 2}, "names": ("a", None, True)}
    assert encode([1]).hex() == "4c000000000000000a49000000000000000131"
    assert digest("golden", value) == (
        "c1cb7809a1fbe06e92abf70904a90638c59d12f7a68fac83f6dfec63bcd6aafc"
    )


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cs"])),
    lambda children: st.lists(children) | st.dictionaries(st.text("abc"), children),
    max_leaves=12,
)


@given(PLAIN, PLAIN)
def test_encodings_are_equal_only_for_equal_trees(one: Any, other: Any):
    assert (encode(one) == encode(other)) == (_fingerprint(one) == _fingerprint(other))


def _fingerprint(value: Any) -> str:
    """Returns an independent notion of sameness: `repr` tells ints, floats and zeros apart."""
    import unicodedata

    if isinstance(value, dict):
        return "dict" + repr(sorted((key, _fingerprint(item)) for key, item in value.items()))
    if isinstance(value, list):
        return repr([_fingerprint(item) for item in value])
    return repr(unicodedata.normalize("NFC", value) if isinstance(value, str) else value)


def test_plain_trees_show_what_counts():
    assert plain({"optimizer": SgdWithMomentum(momentum=0.9, log_dir="x")}) == {
        "optimizer": {"$type": "test.sgd/1", "lr": 0.1, "momentum": 0.9}
    }
