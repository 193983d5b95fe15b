"""Documents of Hugging Face datasets: of the hub at a commit, of a directory, or saved to disk.

`datasets` reads them; since version 4 it runs no code that comes with a dataset. It is imported
when such a source is read, for that takes seconds. Rows come as Arrow, streamed or not, and are the
same either way.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from modeling import canonical
from modeling.data.formats import columns_of, table_documents
from modeling.data.found import Documents, Reading
from modeling.data.sources import SourceError
from modeling.data.sources_config import (
    HuggingFaceSource,
    SavedDatasetSource,
    Validation,
    ValidationSplit,
)
from modeling.data.tables import FEW_ROWS

DatasetSource = HuggingFaceSource | SavedDatasetSource


def dataset_splits(source: DatasetSource, validation: Validation) -> dict[str | None, bool | None]:
    """Returns which splits are read, and whether each is held out as a whole; None: by its ids."""
    if not isinstance(validation, ValidationSplit):
        return {source.split: None}
    if validation.split == source.split:
        raise SourceError(
            f"split {source.split!r} would be both trained on and held out; correct "
            f"`source.split` or `validation.split`."
        )
    return {source.split: False, validation.split: True}


def dataset_path(source: DatasetSource, split: str | None) -> str:
    """Returns what the ids of a split's documents begin with."""
    if isinstance(source, HuggingFaceSource) and source.id is not None:
        return f"{source.id}/{source.name or 'default'}/{split}"
    return split or "rows"


def commit_digest(source: HuggingFaceSource, split: str | None) -> str:
    """Returns the digest of what pins a split on the hub: nothing is fetched for it."""
    pinned = [source.id, source.revision, source.name, split]
    return canonical.digest("huggingface/1", pinned)


def dataset_documents(
    source: DatasetSource, split: str | None, reading: Reading, path: str
) -> Documents:
    """Yields the documents of one split: `path#number` of the row.

    A dataset is read as a whole or not at all, whatever `on_error` says of its rows.

    Raises:
        SourceError: it cannot be opened or read, or lacks a column.
    """
    shown = _shown(source, split)
    yield from table_documents(_batches(source, split, reading, shown), reading, path, shown)


def _batches(
    source: DatasetSource, split: str | None, reading: Reading, shown: str
) -> Iterator[pa.RecordBatch]:
    try:
        dataset: Any = _opened(source, split, shown)
        columns = None
        for table in dataset.with_format("arrow").iter(batch_size=FEW_ROWS):
            columns = columns or columns_of(table.schema, reading, shown)
            yield from table.select(columns).to_batches()
    except SourceError:
        raise
    except Exception as error:  # those of its HTTP client have no class in common
        raise SourceError(f"{shown}: cannot be read: {error}") from error


def _opened(source: DatasetSource, split: str | None, shown: str) -> Any:
    import datasets

    match source:
        case HuggingFaceSource():
            try:
                return datasets.load_dataset(
                    source.id or str(source.path),
                    source.name,
                    revision=source.revision,
                    split=split,
                    streaming=source.streaming,
                )
            except Exception as error:  # those of its HTTP client have no class in common
                raise SourceError(f"{shown}: cannot be opened: {error}") from error
        case SavedDatasetSource():
            saved = datasets.load_from_disk(source.path)
            is_one = isinstance(saved, datasets.Dataset)
            known = ["the only one"] if is_one else sorted(map(str, saved))
            if is_one != (split is None) or not (is_one or split in known):
                raise SourceError(f"{shown}: `source.split` is {split!r}, saved is: {known}.")
            return saved if is_one else saved[split]


def _shown(source: DatasetSource, split: str | None) -> str:
    match source:
        case SavedDatasetSource():
            place = source.path
        case HuggingFaceSource():
            place = source.path or f"{source.id}@{str(source.revision)[:12]}"
    return f"{place}, split {split}" if split else place
