"""The tiny catalog, built once a session through a real Dagster instance."""

import contextlib
import dataclasses
import json
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


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    write_texts(root / "texts")
    return Chain(root / "home", root / "store", root / "texts")


@pytest.fixture(scope="session")
def first_run(request, chain):
    """The first run of everything."""
    result = chain.run(variables={"WANDB_MODE": "offline"})
    failures = [
        event.event_specific_data.error.to_string() for event in result.get_step_failure_events()
    ]
    assert result.success, "\n".join(failures)
    request.config.stash[SHARED] = chain
    return result


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
    return dataclasses.replace(chain, home=tmp_path / "home", store_directory=tmp_path / "store")


VOCABULARY = "dataset.tokenizer.vocab_size=300"
"""A change to the tokenizer, after which everything below it is other."""
REMADE = ("tales/tokenizer", "tales/tokenized_corpus", "tales/token_cache/L32")
"""What of it `changed` has to make."""


@pytest.fixture(scope="session")
def changed_run(chain, first_run, tmp_path_factory):
    """The run of everything after the change, over a copy of the store; and its chain.

    Afterwards the data on the new vocabulary are taken out of the store, and the models are left:
    whoever goes the way from the tokenizer to the exported model again makes the one, and finds
    the others by their recipes, without waiting for the same training.
    """
    root = tmp_path_factory.mktemp("changed")
    own = dataclasses.replace(chain, home=root / "home", store_directory=root / "store")
    shutil.copytree(chain.store_directory, own.store_directory)
    result = own.run(VOCABULARY)
    assert result.success
    for asset in REMADE:
        made = result.asset_value(dg.AssetKey(asset.split("/")))
        shutil.rmtree(own.store_directory / "recipes" / made.recipe_id)
        shutil.rmtree(own.store_directory / "objects" / made.kind / made.content_id)
    return own, result


@pytest.fixture
def changed(changed_run, chain, tmp_path):
    """An instance that remembers the first run, over the store that `changed_run` leaves."""
    shutil.copytree(changed_run[0].store_directory, tmp_path / "store")
    shutil.copytree(chain.home, tmp_path / "home")
    return dataclasses.replace(chain, home=tmp_path / "home", store_directory=tmp_path / "store")


@pytest.fixture
def empty_chain(chain, tmp_path):
    """An instance and a store with nothing in them, over the same texts."""
    return dataclasses.replace(chain, home=tmp_path / "home", store_directory=tmp_path / "store")
