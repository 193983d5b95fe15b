"""The patterns that split text into pre-tokens: as the library knows them, and on whole arrays."""

import math
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

from modeling.data.pretokens import Splitter
from modeling.data.pretokens_cased import LLAMA3, O200K, CasedSplitter
from modeling.data.tokenizers_config import Pattern

_SPELLS = {"type": "ByteLevel", "add_prefix_space": False}
_SPLITS = {"type": "Split", "behavior": "Isolated", "invert": False}
_REGEX: dict[Pattern, str] = {"llama3": LLAMA3, "o200k": O200K}
_OTHER_REGEX = {
    # GPT-2's, spelled out (Radford et al. 2019), and Qwen2's, which has digits one by one.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def splitter(pattern: Pattern) -> Splitter | CasedSplitter:
    """Returns what finds where pre-tokens start."""
    return Splitter() if pattern == "gpt2" else CasedSplitter(_REGEX[pattern])


def pre_tokenizer(pattern: Pattern, *, max_word_bytes: int | None = None) -> Any:
    """Returns the library's pre-tokenizer, which spells bytes as characters.

    Args:
        pattern: what to split by.
        max_word_bytes: cuts longer pre-tokens into pieces.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    steps: list[Any] = [byte_level]
    if pattern != "gpt2":
        steps.insert(0, pre_tokenizers.Split(Regex(_REGEX[pattern]), "isolated"))
    if max_word_bytes is not None:
        steps.append(pre_tokenizers.FixedLength(max_word_bytes))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def pattern_of(setup: Mapping[str, Any]) -> Pattern | None:
    """Returns the pattern of a pre-tokenizer, given as JSON, that only spells and cuts words."""
    first, *rest = setup.get("pretokenizers", [setup])
    rest = [step for step in rest if step.get("type") != "FixedLength"]
    if not rest and _has(first, _SPELLS | {"use_regex": True}):
        return "gpt2"
    if len(rest) == 1 and _has(first, _SPLITS) and _has(rest[0], _SPELLS | {"use_regex": False}):
        regex = first["pattern"].get("Regex")
        return next((name for name, known in _REGEX.items() if known == regex), None)
    return None


def longest_word(setup: Mapping[str, Any]) -> int | float:
    """Returns the bytes beyond which a pre-tokenizer that spells bytes, as JSON, cuts words."""
    steps = setup.get("pretokenizers", [setup])
    lengths = [step["length"] for step in steps if step["type"] == "FixedLength"]
    return min(lengths, default=math.inf)


def splits_at_spaces(step: Mapping[str, Any]) -> bool:
    """Whether letters end a pre-token where a space follows, by a pattern of which that is known.

    Args:
        step: a pre-tokenizer, as JSON.
    """
    if step["type"] == "ByteLevel":
        return step["use_regex"]
    return _has(step, _SPLITS) and step["pattern"].get("Regex") in {
        *_REGEX.values(),
        *_OTHER_REGEX,
    }


def _has(step: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return {key: step.get(key) for key in expected} == expected
