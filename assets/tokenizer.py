"""The tokenizer, and the proof that it loses nothing."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.catalog import config_metadata
from assets.checks import artifact_check
from modeling import recipes
from modeling.artifacts import Artifact
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig


def tokenizer_assets(
    name: str, dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, tokenizer]` and its check; only one trained here depends on the corpus."""
    params = recipes.tokenizer_params(dataset)
    asset = dg.asset(
        key=[name, "tokenizer"],
        ins={"raw_corpus": dg.AssetIn([name, "raw_corpus"])}
        if recipes.is_trained_here(dataset.tokenizer)
        else {},
        group_name=name,
        kinds={"huggingface"},
        description=_DESCRIPTIONS[dataset.tokenizer.type],
        code_version=recipes.code_version("tokenizer", params),
        metadata=config_metadata(params),
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
        )

    def taken(store: StoreResource) -> dg.MaterializeResult[Artifact]:
        from modeling.data import tokenizer

        recipe = recipes.tokenizer_recipe(dataset, None, tokenizer.files_root(dataset.tokenizer))
        return store.materialize(
            recipe, lambda space: tokenizer.build(dataset.tokenizer, None, space)
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
