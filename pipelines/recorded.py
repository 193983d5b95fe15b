"""A catalog that says what an artifact's records say, so that it can be made again from them.

A record holds every parameter that can change a result, with its defaults filled in, and its
numerics class holds how the computation was laid out. Both are read back as the configuration that
they were written from. What cannot change a result is on no record: it takes its default. The one
such thing without which nothing can be made is where files lie, and that is taken from a dataset of
today's catalog that describes the same source.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from modeling import canonical, numerics, recipes
from modeling.artifacts import ArtifactStore
from modeling.data.config import DatasetConfig  # noqa: TID253 (loads no JAX)
from modeling.experiment import Catalog, ConfigError, ExperimentConfig, validate

DATA, RUN = "recorded_data", "recorded_run"
"""Names of the dataset and the experiment of such a catalog."""
_NOWHERE = "/not/on/record"
_MODELS = ("checkpoint", "eval_report", "hf_model")
_PLACES = {
    "source.files/1": "paths",
    "source.saved_dataset/1": "path",
    "validation.files/1": "paths",
}
"""The field of a class that says where files lie, where it always has one."""
_HUBS = {"source.huggingface/1": "id", "tokenizer.pretrained/1": "hub"}
"""The field of a class that is there instead of a `path`."""
Record = Mapping[str, Any]


class UnreadableRecordError(ValueError):
    """What a record says is no configuration of this version, or lacks where its files lie."""


def recorded_catalog(
    store: ArtifactStore, record: Record, today: Catalog
) -> tuple[Catalog, dg.AssetKey]:
    """Returns a catalog in which the artifact of a record is an asset, and that asset's key.

    Args:
        store: holds the records of what it was made from.
        record: of the artifact.
        today: says where the files of a source lie.

    Raises:
        UnreadableRecordError: see there; or something that it was made from has no record.
    """
    above = _records_above(store, record)
    known = {one["kind"]: one["recipe"]["params"] for one in above}
    with _told_as_unreadable(record):
        dataset = _dataset(known, record["kind"], today)
        is_model = record["kind"] in _MODELS
        catalog = Catalog({DATA: dataset}, {RUN: _experiment(known, above)} if is_model else {})
    if is_model:
        return catalog, dg.AssetKey([RUN, record["kind"]])
    rows = [dataset.sequence_lengths[0].name] if record["kind"].startswith("token_cache") else []
    return catalog, dg.AssetKey([DATA, record["kind"], *rows])


def recorded_experiment(store: ArtifactStore, record: Record) -> ExperimentConfig:
    """Returns the experiment that a checkpoint's record says."""
    above = _records_above(store, record)
    with _told_as_unreadable(record):
        return _experiment({one["kind"]: one["recipe"]["params"] for one in above}, above)


@contextlib.contextmanager
def _told_as_unreadable(record: Record) -> Iterator[None]:
    """Says of a record without a field that this version wants, that it is of another one."""
    try:
        yield
    except (KeyError, IndexError, TypeError) as error:
        raise UnreadableRecordError(
            f"what its records say is not what this version of {record['kind']} has: "
            f"{type(error).__name__}: {error}."
        ) from error


def _records_above(store: ArtifactStore, record: Record) -> list[Record]:
    """Returns a record and those of all that it was made from, the nearest of each kind."""
    index = store.records_by_object()
    found, waiting = {record["kind"]: record}, [record]
    while waiting:
        child = waiting.pop(0)
        for role, given in child["recipe"]["inputs"].items():
            if role == recipes.INITIAL_CHECKPOINT or given["kind"] in found:
                continue
            records = index.get((given["kind"], given["content_id"]))
            if not records:
                raise UnreadableRecordError(
                    f"{child['kind']} {child['content_id'][:12]}: its input {given['kind']} "
                    f"{given['content_id'][:12]} has no record in {store.url}; see `levanter fsck`."
                )
            found[given["kind"]] = records[-1]
            waiting.append(records[-1])
    return list(found.values())


def _dataset(known: Mapping[str, Any], kind: str, today: Catalog) -> DatasetConfig:
    corpus = dict(known.get("raw_corpus", {"source": {"type": "pystdlib"}}))
    for name in ("listing", "format", "formats"):
        corpus.pop(name, None)
    cache = dict(known.get("token_cache", {"sequence_length": 8}))
    cache["length"] = cache.pop("sequence_length")
    if kind == "token_cache_copy":
        cache["layout"] = "copy"
    tokenizer = known.get("tokenizer", {"tokenizer": {"type": "bpe", "vocab_size": 257}})
    raw = _written(corpus) | {
        "tokenizer": _written(tokenizer["tokenizer"]),
        "sequence_lengths": [cache],
        "tokenization": _written(known.get("tokenized_corpus", {}).get("tokenization", {})),
    }
    formats = _formats(known)
    if "sources" in raw:
        for name, source in raw["sources"].items():
            source["record"] = formats[name]
    else:
        raw["format"] = formats[""]
    dataset = _read(DatasetConfig, raw)
    if kind == "raw_corpus":
        wanted = {name: v for name, v in known["raw_corpus"].items() if name != "listing"}
        return _of_today(today, recipes.corpus_params, wanted, "source")
    if kind == "tokenizer" and getattr(dataset.tokenizer, "path", None) is not None:
        wanted = {name: v for name, v in known["tokenizer"].items() if name != "files"}
        return _of_today(today, recipes.tokenizer_params, wanted, "tokenizer")
    return dataset


def _of_today(today: Catalog, params: Any, wanted: Any, what: str) -> DatasetConfig:
    """Returns the dataset of the catalog that has what is on record, and says where it lies."""
    for dataset in today.datasets.values():
        if canonical.plain(params(dataset)) == wanted:
            return dataset
    raise UnreadableRecordError(
        f"no record says where the files of its {what} lie, and no dataset of the catalog has that "
        f"{what}: {wanted}. Add one with these fields, and the paths of today."
    )


def _formats(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a record of each source is, of what the corpus and the tokens say of it."""
    corpus, tokens = known.get("raw_corpus", {}), known.get("tokenized_corpus", {})
    names = corpus.get("sources", {"": None})

    def said(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        return params.get("formats", {}).get(name, params.get("format", {}))

    return {name: _format(said(corpus, name), said(tokens, name)) for name in names}


def _format(reading: Mapping[str, Any], rendering: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a format as a file has it: the inverse of its `reading` and `rendering`."""
    kind = reading.get("type", "text")
    fields: Sequence[str] = reading.get("fields", ())
    match kind:
        case "chat":
            named = {"messages_field": fields[0], "context_fields": fields[1:]}
        case "supervised":
            named = {"prompt_field": fields[0], "completion_field": fields[1]}
        case "ids":
            named = {name: reading[name] for name in ("separator_id", "dtype")}
            named["field"] = fields[0]
        case _:
            named = {}
    return {"type": kind} | named | {k: v for k, v in rendering.items() if k != "type"}


def _experiment(known: Mapping[str, Any], above: Sequence[Record]) -> ExperimentConfig:
    params = known["checkpoint"]
    (trained,) = (one for one in above if one["kind"] == "checkpoint")
    known_class = trained["numerics"]["class"]
    rows = known["token_cache"]
    return _read(
        ExperimentConfig,
        {
            "dataset": DATA,
            "sequence_length": rows["sequence_length"],
            "packing": rows["packing"],
            "model": _written(params["model"]) | dict(known_class["execution"]),
            "optimizer": _written(params["optimizer"]),
            "trainer": _written(params["trainer"]) | numerics.trainer_fields(known_class),
            "evaluation": _written(known.get("eval_report", {}).get("evaluation", {})),
            "export": _written(known.get("hf_model", {}).get("export", {})),
        },
    )


def _written(value: Any) -> Any:
    """Returns plain data as a file has it: without tags of classes, with some place of files."""
    if isinstance(value, Mapping):
        fields = {name: _written(item) for name, item in value.items() if name != "$type"}
        tag = value.get("$type")
        if tag in _PLACES:
            place = _PLACES[tag]
            fields[place] = [_NOWHERE] if place == "paths" else _NOWHERE
        elif tag in _HUBS and fields[_HUBS[tag]] is None:
            fields["path"] = _NOWHERE
        return fields
    return [_written(item) for item in value] if isinstance(value, list) else value


def _read(kind: type[Any], raw: Mapping[str, Any]) -> Any:
    try:
        return validate(kind, raw, "its record")
    except ConfigError as error:
        raise UnreadableRecordError(f"this version cannot read it: {error}") from None
