"""The patterns that split text into pre-tokens: as the library knows them, and on whole arrays."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

from modeling.data.pretokens import Splitter
from modeling.data.pretokens_cased import LLAMA3, O200K, CasedSplitter
from modeling.data.tokenizers_config import Pattern

_SPELLS = {"type": "ByteLevel", "add_prefix_space": False}
_SPLITS = {"type": "Split", "behavior": "Isolated", "invert": False}
_REGEX: dict[Pattern, str] = {"llama3": LLAMA3, "o200k": O200K}


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


def _has(step: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return {key: step.get(key) for key in expected} == expected
