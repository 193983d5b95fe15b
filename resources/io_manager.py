"""Hands artifacts from asset to asset as references: some lines of JSON, no bytes, no pickle.

    <store>/refs/<scope>/latest/<asset key>.json           what a later run takes, however launched
    <store>/refs/<scope>/runs/<run id>/<asset key>.json    what the steps of one run take

A run takes what it has made itself, so two runs at once with different overrides never read each
other's tokenizer. `scope` tells Dagster instances apart that share a store: it is made of the id of
their run storage, which a home takes along when it is moved.
"""

import hashlib
from typing import Any

import dagster as dg
import fsspec
from dagster._core.storage.runs import SqlRunStorage

from modeling.artifacts import Artifact, parse_reference, reference_bytes
from modeling.notes import Note
from resources.store import store_url


class ReferenceIOManager(dg.IOManager):
    """Keeps `Artifact` references under one URL."""

    def __init__(self, url: str, scope: str) -> None:
        """Keeps references of `scope` below the store at `url`."""
        self._fs, root = fsspec.url_to_fs(url)
        self._root = f"{str(root).rstrip('/')}/refs/{scope}"

    def handle_output(self, context: dg.OutputContext, obj: Artifact) -> None:
        """Writes the reference for this run and for those that follow."""
        if not isinstance(obj, Artifact):
            raise TypeError(
                f"{context.asset_key.to_user_string()}: an asset hands on a "
                f"`modeling.artifacts.Artifact`, found {type(obj).__name__}."
            )
        self._write(self._run_path(context.run_id, context.asset_key), obj)
        self.remember(context.asset_key, obj)

    def remember(self, key: dg.AssetKey, artifact: Artifact) -> None:
        """Makes `artifact` what later runs take as the asset."""
        self._write(self._latest_path(key), artifact)

    def load_input(self, context: dg.InputContext) -> Artifact:
        """Reads the reference that this run has written, or else the latest one."""
        own = self._run_path(context.step_context.run_id, context.asset_key)
        return self._read(own) if self._fs.exists(own) else self.latest(context.asset_key)

    def latest(self, key: dg.AssetKey) -> Artifact:
        """Reads the reference that the last run of this asset has left.

        Raises:
            FileNotFoundError: there was none.
        """
        path = self._latest_path(key)
        if not self._fs.exists(path):
            name = key.to_user_string()
            raise FileNotFoundError(
                f"{name} has never been materialized here (no {path}). Materialize it first, or "
                f"select everything upstream: `dagster asset materialize --select '*{name}'`."
            )
        return self._read(path)

    def _read(self, path: str) -> Artifact:
        return parse_reference(self._fs.cat_file(path), path)

    def _write(self, path: str, artifact: Artifact) -> None:
        """Replaces the reference as a whole, as object stores do anyway."""
        Note(self._fs, path).replace(reference_bytes(artifact))

    def _run_path(self, run_id: str, key: dg.AssetKey) -> str:
        return f"{self._root}/runs/{run_id}/{'/'.join(key.path)}.json"

    def _latest_path(self, key: dg.AssetKey) -> str:
        return f"{self._root}/latest/{'/'.join(key.path)}.json"


class ReferenceIOManagerFactory(dg.ConfigurableIOManagerFactory[ReferenceIOManager]):
    """References beside the artifacts, apart for each Dagster instance."""

    url: str | None = None

    def create_io_manager(self, context: Any) -> ReferenceIOManager:
        """Opens the references of the instance that runs this."""
        return ReferenceIOManager(store_url(self.url), scope_of(context.instance))


def scope_of(instance: dg.DagsterInstance | None) -> str:
    """Returns a short name of an instance, wherever it lies; all ephemeral ones share one."""
    if instance is None or instance.is_ephemeral:
        return "ephemeral"
    # The first to ask makes the id; of two at once both take the one that is there after that.
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        raise TypeError(
            f"{type(storage).__name__} has no id by which its references are told from those "
            f"of other instances; take a run storage of Dagster's own in `dagster.yaml`."
        )
    storage.get_run_storage_id()
    return hashlib.sha256(storage.get_run_storage_id().encode()).hexdigest()[:12]
