"""The tokenizer, and the proof that it loses nothing."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.catalog import stage
from assets.checks import artifact_check
from modeling import recipes
from modeling.artifacts import Artifact
from resources import panel
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig

_MOST_SHOWN, _MOST_CHARACTERS = 40, 80


def tokenizer_assets(
    name: str, dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, tokenizer]` and its check; only one trained here depends on the corpus."""
    asset = stage(
        "tokenizer",
        recipes.tokenizer_params(dataset),
        [name, "tokenizer"],
        of=dataset,
        kinds={"huggingface"},
        ins={"raw_corpus": [name, "raw_corpus"]}
        if recipes.is_trained_here(dataset.tokenizer)
        else {},
        description=_DESCRIPTIONS[dataset.tokenizer.type],
        places=getattr(dataset.tokenizer, "path", None),
    )

    def trained(
        context: dg.AssetExecutionContext, raw_corpus: Artifact, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        from modeling.data import tokenizer

        documents = store.files(raw_corpus)
        return store.materialize(
            recipes.tokenizer_recipe(dataset, raw_corpus),
            lambda space: tokenizer.build(
                dataset.tokenizer, documents, space, report=lambda now: context.log.info(str(now))
            ),
            show=lambda _, files: _shown(files),
        )

    def taken(store: StoreResource) -> dg.MaterializeResult[Artifact]:
        from modeling.data import tokenizer

        files = tokenizer.file_digests(dataset.tokenizer)
        recipe = recipes.tokenizer_recipe(dataset, None, tokenizer.files_root(files))
        return store.materialize(
            recipe,
            lambda space: tokenizer.build(dataset.tokenizer, None, space),
            show=lambda _, files: _shown(files),
        )

    round_trips = artifact_check(
        dg.AssetKey([name, "tokenizer"]),
        "round_trips",
        "Hostile texts come back unchanged from a tokenizer trained here, none yields the "
        "end-of-text id, and the installed library still gives the ids of the probe vector.",
        functools.partial(_faults, is_lossless=dataset.tokenizer.type != "pretrained"),
    )
    return [asset(trained if recipes.is_trained_here(dataset.tokenizer) else taken), round_trips]


_DESCRIPTIONS = {
    "bpe": "Byte-level BPE trained on the training split, as a canonical `tokenizer.json`.",
    "wordpiece": "Byte-level WordPiece trained on the training split, as a canonical "
    "`tokenizer.json`.",
    "unigram": "Byte-level Unigram trained on the training split, as a canonical `tokenizer.json`.",
    "pretrained": "A tokenizer made elsewhere, as a canonical `tokenizer.json`.",
    "passthrough": "The declared vocabulary of documents that are ids already.",
}


def _faults(
    artifact: Artifact, files: Path, store: StoreResource, *, is_lossless: bool
) -> Iterator[str]:
    from modeling.data.tokenizer import PROBE_TEXTS, PassthroughTokenizer, load_tokenizer

    tokenizer = load_tokenizer(files)  # Compares the probe vector, and says what differs.
    if tokenizer.vocab_size != artifact.facts["vocab_size"]:
        yield f"{tokenizer.vocab_size} ids read back, {artifact.facts['vocab_size']} built."
    if isinstance(tokenizer, PassthroughTokenizer):
        return
    for text in PROBE_TEXTS:
        ids = tokenizer.encode(text)
        if is_lossless and tokenizer.decode(ids) != text:
            yield f"{text[:40]!r} comes back as {tokenizer.decode(ids)[:40]!r}."
        if tokenizer.eos_id in ids:
            yield f"the text {text[:40]!r} ends a document: it yields id {tokenizer.eos_id}."


def _shown(files: Path) -> Mapping[str, Any]:
    """Returns the special tokens and the longest others, as what they stand for."""
    from modeling.data.examples import Texts
    from modeling.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(files)
    texts = Texts(tokenizer)
    tokens = [
        token for number in range(tokenizer.vocab_size) for token in texts.shown([(number, True)])
    ]
    special = [token for token in tokens if token.kind == "special"]
    others = [token for token in tokens if token.kind == "text"]
    others.sort(key=lambda token: (-len(token.text), token.token_id))
    rows = (
        (token.token_id, token.kind, token.text[:_MOST_CHARACTERS])
        for token in special + others[:_MOST_SHOWN]
    )
    return {"vocabulary": panel.table(("id", "kind", "text"), rows)}
