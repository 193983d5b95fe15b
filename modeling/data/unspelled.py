r"""Clones of a tokenizer in which no text spells a special token.

The library can be told to look for no special token in a text. But a model may have one as a word
of its own vocabulary, as SentencePiece's have `</s>`, and gives its id to a text that spells it. So
texts are encoded by a clone in which such tokens go by another name, with the same ids:

    tokenizer   vocabulary 2: "</s>"
    clone       vocabulary 2: "\ufdd02\ufdd0"       of texts without U+FDD0, a noncharacter

For texts with n of these the mark on both sides is n + 1 of them or more, which no normalizer makes
of n. A byte-level model sees U+FDD0 as three bytes, and never spells the name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from modeling.data.vocabularies import merges_of

_MARK = "\ufdd0"


class Unspelled:
    """Gives the clone that encodes some texts, or the tokenizer itself where it is safe."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> None:
        """Takes a tokenizer, and the id of each token that no text may spell."""
        setup_json = backend.to_str()
        self.setup: Mapping[str, Any] = json.loads(setup_json)
        """What the tokenizer is; parsed once, since that takes longer than many a text."""
        model = self.setup["model"]
        self.is_safe = not any(_may_be_spelled(model, token) for token in special)
        """Whether the tokenizer itself gives no text a special token."""
        self._backend = backend
        self._setup_json = setup_json
        self._special = dict(special)
        self._clones: dict[str, tokenizers.Tokenizer] = {}

    def for_texts(self, texts: Sequence[str]) -> tokenizers.Tokenizer:
        """Returns what gives the ids of these texts, none of them special."""
        if self.is_safe:
            return self._backend
        most = max((text.count(_MARK) for text in texts), default=0)
        mark = _MARK * (1 << most.bit_length())  # few clones, however many marks
        if mark not in self._clones:
            names = {token: f"{mark}{row}{mark}" for token, row in self._special.items()}
            self._clones[mark] = renamed(self._setup_json, self._special, names)
            self._clones[mark].encode_special_tokens = True
        return self._clones[mark]


def renamed(
    setup_json: str, special: Mapping[str, int], names: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Returns a tokenizer with other names for its special tokens, and the same ids.

    Args:
        setup_json: the tokenizer.
        special: the id of each special token.
        names: the new name of each.
    """
    setup = json.loads(setup_json)
    model = setup["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): row for word, row in model["vocab"].items()}
    else:  # Unigram's, where ids are places
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # one that gives a special token must not, nor go on from it
        model["merges"] = [
            pair for pair in merges_of(model) if not {*pair, "".join(pair)} & {*names}
        ]
    for token in setup["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            # Whoever writes it means it, whatever stands beside it.
            token["single_word"] = token["normalized"] = False
    setup["post_processor"] = None  # it trims offsets
    clone = tokenizers.Tokenizer.from_str(json.dumps(setup))
    of_added = {token.content for token in clone.get_added_tokens_decoder().values()}
    in_vocabulary_alone = [name for name in names.values() if name not in of_added]
    clone.add_special_tokens([AddedToken(n, normalized=False) for n in in_vocabulary_alone])
    assert all(clone.token_to_id(names[token]) == row for token, row in special.items())
    return clone


def _may_be_spelled(model: Mapping[str, Any], token: str) -> bool:
    """Whether a model may give a token's id to a text, as far as its kind tells."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return any(word == token for word, _ in vocab)
    if token not in vocab:
        return False
    if model["type"] != "BPE" or model.get("ignore_merges") or len(token) == 1:
        return True
    return token in map("".join, merges_of(model))
