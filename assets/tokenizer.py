"""The tokenizer, and the proof that it loses nothing."""

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
    """Returns `[name, tokenizer]` and its check."""

    @dg.asset(
        key=[name, "tokenizer"],
        ins={"raw_corpus": dg.AssetIn([name, "raw_corpus"])},
        group_name=name,
        kinds={"huggingface"},
        code_version=recipes.code_version("tokenizer", recipes.tokenizer_params(dataset)),
        metadata=config_metadata(recipes.tokenizer_params(dataset)),
    )
    def tokenizer(
        context: dg.AssetExecutionContext, raw_corpus: Artifact, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        """Byte-level BPE trained on the training split, as a canonical `tokenizer.json`."""
        from modeling.data import tokenizer

        documents = store.files(raw_corpus)
        return store.materialize(
            recipes.tokenizer_recipe(dataset, raw_corpus),
            lambda space: tokenizer.build(
                dataset.tokenizer, documents, space, report=lambda now: context.log.info(str(now))
            ),
        )

    round_trips = artifact_check(
        dg.AssetKey([name, "tokenizer"]),
        "round_trips",
        "Hostile texts come back unchanged, no text yields the end-of-text id, and the installed "
        "library still gives the ids of the probe vector.",
        _faults,
    )
    return [tokenizer, round_trips]


def _faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer

    tokenizer = Tokenizer.load(files)  # Compares the probe vector, and says what differs.
    if tokenizer.vocab_size != artifact.facts["vocab_size"]:
        yield f"{tokenizer.vocab_size} ids read back, {artifact.facts['vocab_size']} built."
    for text in PROBE_TEXTS:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            yield f"{text[:40]!r} comes back as {tokenizer.decode(ids)[:40]!r}."
        if tokenizer.eos_id in ids:
            yield f"the text {text[:40]!r} ends a document: it yields id {tokenizer.eos_id}."
