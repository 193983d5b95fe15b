"""The raw corpus: documents decoded from a listing of files, and the proof that none was lost."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.catalog import stage
from assets.checks import artifact_check
from modeling import recipes
from modeling.artifacts import Artifact
from resources import panel
from resources.digests import open_memo
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig


def corpus_assets(
    name: str, dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, raw_corpus]` and its check."""

    @stage(
        "raw_corpus",
        recipes.corpus_params(dataset),
        [name, "raw_corpus"],
        of=dataset,
        kinds={"arrow"},
        places=_places(dataset),
    )
    def raw_corpus(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        """Every document of the source, decoded, with its split.

        Each run lists and digests the source's files anew: a new, changed or vanished file changes
        this artifact. The documents are kept, so that later stages never depend on the source.
        """
        from modeling.data import corpus

        listing = corpus.scan(
            dataset.named_sources, validation=dataset.validation, memo=open_memo()
        )
        recipe = recipes.corpus_recipe(dataset, listing.root)
        return store.materialize(
            recipe,
            lambda space: corpus.build(
                dataset.named_sources,
                listing,
                space,
                document_format=dataset.format,
                report=lambda now: context.log.info(str(now)),
            ),
            show=lambda made, _: _shown(made),
        )

    counts_add_up = artifact_check(
        dg.AssetKey([name, "raw_corpus"]),
        "counts_add_up",
        "The documents read back are as many, and as long, as the build counted; none is empty.",
        _faults,
    )
    return [raw_corpus, counts_add_up]


def _places(dataset: "DatasetConfig") -> Mapping[str, Any] | None:
    """Returns the paths of each source that has some, and those of files that are held out."""
    found: dict[str, Any] = {
        name or "source": [*getattr(source, "paths", ()), *getattr(source.validation, "paths", ())]
        or getattr(source, "path", None)
        for name, source in dataset.named_sources.items()
    } | {"validation": [*getattr(dataset.validation, "paths", ())]}
    return {name: paths for name, paths in found.items() if paths} or None


def _shown(corpus: Artifact) -> Mapping[str, Any]:
    documents, num_bytes = corpus.facts["documents"], corpus.facts["bytes"]
    return {
        "dagster/row_count": sum(documents.values()),
        "splits": panel.table(
            ("split", "documents", "bytes"),
            ((split, documents[split], num_bytes[split]) for split in documents),
        ),
    }


def _faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    from modeling.data import corpus

    documents: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for document in corpus.stored_documents(files):
        documents[document.split] += 1
        num_bytes[document.split] += len(document.text)
        if not document.text:
            yield f"document {document.doc_id} is empty."
    for name, found in (("documents", documents), ("bytes", num_bytes)):
        for split, expected in artifact.facts[name].items():
            if found[split] != expected:
                yield f"{split}: {found[split]} {name} read back, {expected} counted by the build."
    for split in set(documents) - set(artifact.facts["documents"]):
        yield f"{documents[split]} documents are of split {split!r}, which the build did not have."
