"""The tiny catalog, built once for all of pytest's workers through a real Dagster instance."""

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import dagster as dg
import pytest

from modeling.artifacts import Artifact, ArtifactStore
from modeling.experiment import load_catalog
from pipelines.build import build_defs
from pipelines.instance import ensure_home
from pipelines.plan import out_of_date, wanted_assets
from resources.io_manager import ReferenceIOManager, scope_of
from resources.store import open_store

SHARED = pytest.StashKey["Chain"]()
CATALOG = Path(__file__).parent.parent / "catalogs" / "tiny"
WORDS = (
    *("the", "a", "one", "old", "young", "sailor", "king", "fox", "river", "sea", "house"),
    *("night", "light", "stone", "bread", "wind", "said", "went", "saw", "took", "gave", "loved"),
    *("lost", "found", "over", "under", "with", "and", "but", "then", "when", "never", "always"),
)


def write_texts(directory: Path) -> None:
    """Writes sixty short tales, the same ones each time."""
    directory.mkdir(parents=True)
    for number in range(60):
        words = random.Random(number)
        sentences = (" ".join(words.choices(WORDS, k=9)).capitalize() for _ in range(30))
        (directory / f"{number:02d}.txt").write_text(".\n".join(sentences) + ".\n")


@dataclasses.dataclass(frozen=True)
class Chain:
    """A Dagster instance and a store, with the tiny catalog over some texts."""

    home: Path
    store_directory: Path
    texts: Path

    def overrides(self, *changes):
        paths = json.dumps([str(self.texts / "*.txt")])
        return {"tiny": [f"dataset.source.paths={paths}", *changes]}

    def environment(self, *changes):
        """What a process must be told to see this chain."""
        return {
            "DAGSTER_HOME": str(self.home),
            "LEVANTER_STORE": str(self.store_directory),
            "LEVANTER_CATALOG": str(CATALOG),
            "LEVANTER_OVERRIDES": json.dumps(self.overrides(*changes)),
            "WANDB_MODE": "disabled",  # but for the first run: it takes seconds to start
        }

    @contextlib.contextmanager
    def instance(self, **variables):
        """Opens the instance, with this process's environment set to it."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.environment(), **variables}.items():
                patch.setenv(name, value)
            ensure_home()
            with dg.DagsterInstance.get() as instance:
                yield instance

    def catalog(self, *changes):
        return load_catalog(CATALOG, self.overrides(*changes))

    def defs(self, *changes, **resources):
        return build_defs(self.catalog(*changes), **resources)

    def with_own_texts(self, directory: Path) -> "Chain":
        """Returns this chain over a copy of the texts that a test may change."""
        write_texts(directory)
        return dataclasses.replace(self, texts=directory)

    def under(self, root: Path) -> "Chain":
        """Returns a chain over the same texts, with home and store below `root`."""
        return dataclasses.replace(self, home=root / "home", store_directory=root / "store")

    def run(self, *changes, select=None, variables=None, job="tiny", **resources):
        """Runs the job, or some assets of it, in this process."""
        with self.instance(**(variables or {})) as instance:
            resolved = self.defs(*changes, **resources).resolve_job_def(job)
            return resolved.execute_in_process(
                instance=instance,
                raise_on_error=False,
                asset_selection=select and [dg.AssetKey(list(key)) for key in select],
            )

    @staticmethod
    def metadata_of(result):
        """Returns the metadata of each materialization of a run, by the asset's key."""
        return {
            event.asset_key.to_user_string(): {
                name: value.value for name, value in event.materialization.metadata.items()
            }
            for event in result.get_asset_materialization_events()
        }

    @staticmethod
    def was(result):
        """Returns for each asset of a run whether it was built or reused."""
        return {key: shown["was"] for key, shown in Chain.metadata_of(result).items()}

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.store_directory))

    def artifact(self, *key) -> Artifact:
        """Returns what the latest run left for those that follow."""
        with self.instance() as instance:
            manager = ReferenceIOManager(str(self.store_directory), scope_of(instance))
        return manager.latest(dg.AssetKey(list(key)))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run as its instance remembers it, whichever process ran it."""

    chain: Chain
    run_id: str

    def get_asset_materialization_events(self):
        """Returns them as the result of a run in this process does."""
        return self._events(dg.DagsterEventType.ASSET_MATERIALIZATION)

    def get_asset_check_evaluations(self):
        """Returns them as the result of a run in this process does."""
        events = self._events(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        return [event.asset_check_evaluation_data for event in events]

    def asset_value(self, key):
        """Returns what the run left of an asset."""
        return self.chain.artifact(*key.path)

    def _events(self, kind):
        with self.chain.instance() as instance:
            return [entry.dagster_event for entry in instance.all_logs(self.run_id, of_type=kind)]


@pytest.fixture(scope="session")
def for_all_workers(tmp_path_factory):
    """The directory that all workers of pytest see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(own: Chain, *changes, over: Path | None = None, **how) -> Recorded:
    """Runs everything in `own`, if no other worker of pytest has, and tells of that run.

    Whoever comes while another is at it waits.

    Args:
        own: where it is made, home and store beside each other.
        changes: to the catalog.
        over: the store to begin with a copy of; None begins with an empty one.
        how: what `Chain.run` takes.
    """
    root = own.home.parent
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = root / "run_id"
        if not done.exists():
            if over is not None:
                shutil.copytree(over, own.store_directory)
            result = own.run(*changes, **how)
            failures = [
                event.event_specific_data.error.to_string()
                for event in result.get_step_failure_events()
            ]
            assert result.success, "\n".join(failures)
            done.write_text(result.run_id)
        return Recorded(own, done.read_text())


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    write_texts(root / "texts")
    return Chain(root / "home", root / "store", root / "texts")


@pytest.fixture(scope="session")
def first_run(request, chain, for_all_workers):
    """The first run of everything, of which each worker has a copy."""
    made = made_once(chain.under(for_all_workers / "first"), variables={"WANDB_MODE": "offline"})
    shutil.rmtree(chain.home, ignore_errors=True)  # of tests that only looked
    shutil.copytree(made.chain.home, chain.home)
    shutil.copytree(made.chain.store_directory, chain.store_directory)
    request.config.stash[SHARED] = chain
    return Recorded(chain, made.run_id)


@pytest.fixture(scope="module", autouse=True)
def left_as_found(request):
    """Fails the file that leaves the shared chain changed, not the one that finds it so."""
    yield
    if chain := request.config.stash.get(SHARED, None):
        kinds = [record["kind"] for record in chain.store.records()]
        assert len(kinds) == len(set(kinds)), f"more was made in the shared store: {kinds}"
        defs, catalog = chain.defs(), chain.catalog()
        with chain.instance() as instance:
            wanted = wanted_assets(defs, "tiny")
            assert not (found := out_of_date(defs, instance, chain.store, catalog, wanted)), found


@pytest.fixture
def other_instance(chain, first_run, tmp_path):
    """An instance that remembers nothing, over a copy of the store."""
    shutil.copytree(chain.store_directory, tmp_path / "store")
    return chain.under(tmp_path)


VOCABULARY = "dataset.tokenizer.vocab_size=300"
"""A change to the tokenizer, after which everything below it is other."""
REMADE = ("tales/tokenizer", "tales/tokenized_corpus", "tales/token_cache/L32")
"""What of it `changed` has to make."""


@pytest.fixture(scope="session")
def changed_run(chain, first_run, for_all_workers):
    """The run of everything after the change, over a copy of the store."""
    own = chain.under(for_all_workers / "changed")
    return made_once(own, VOCABULARY, over=chain.store_directory)


def begin_changed(first: Chain, changed_run: Recorded, root: Path) -> Chain:
    """Returns an instance that remembers the first run, over models on the new vocabulary.

    The data on it are not in its store: whoever goes the way from the tokenizer to the exported
    model makes those, and finds the models by their recipes, without waiting for the same training.
    """
    own = first.under(root)
    shutil.copytree(first.home, own.home)
    shutil.copytree(changed_run.chain.store_directory, own.store_directory)
    for asset in REMADE:
        made = changed_run.asset_value(dg.AssetKey(asset.split("/")))
        shutil.rmtree(own.store_directory / "recipes" / made.recipe_id)
        shutil.rmtree(own.store_directory / "objects" / made.kind / made.content_id)
    return own


@pytest.fixture
def changed(changed_run, chain, tmp_path):
    return begin_changed(chain, changed_run, tmp_path)


@pytest.fixture
def empty_chain(chain, tmp_path):
    """An instance and a store with nothing in them, over the same texts."""
    return chain.under(tmp_path)
