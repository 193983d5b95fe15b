"""The tiny catalog, built once a session through a real Dagster instance."""

import dataclasses
import json
import random
from pathlib import Path

import dagster as dg
import pytest

from modeling.artifacts import Artifact, ArtifactStore
from modeling.experiment import load_catalog
from pipelines.build import build_defs
from pipelines.instance import ensure_home
from resources.store import open_store

CATALOG = Path(__file__).parent.parent / "catalogs" / "tiny"
WORDS = (
    "the a one old young sailor king fox river sea house night light stone bread wind said went "
    "saw took gave loved lost found over under with and but then when never always again little"
).split()


def write_texts(directory: Path) -> None:
    """Writes sixty short tales, the same ones each time."""
    directory.mkdir(parents=True)
    for number in range(60):
        words = random.Random(number)
        sentences = (" ".join(words.choices(WORDS, k=9)).capitalize() for _ in range(30))
        (directory / f"{number:02d}.txt").write_text(".\n".join(sentences) + ".\n")


@dataclasses.dataclass(frozen=True)
class Chain:
    """A store and a Dagster instance with the tiny catalog over some texts."""

    home: Path
    texts: Path

    def overrides(self, *changes: str) -> dict[str, list[str]]:
        paths = json.dumps([str(self.texts / "*.txt")])
        return {"tiny": [f"dataset.source.paths={paths}", *changes]}

    def defs(self, *changes: str) -> dg.Definitions:
        return build_defs(load_catalog(CATALOG, self.overrides(*changes)))

    def run(self, *changes: str, job: str = "tiny") -> dg.ExecuteInProcessResult:
        with dg.DagsterInstance.get() as instance:
            resolved = self.defs(*changes).resolve_job_def(job)
            return resolved.execute_in_process(instance=instance, raise_on_error=False)

    def environment(self) -> dict[str, str]:
        """What a clean shell needs to see this chain."""
        return {
            "DAGSTER_HOME": str(self.home),
            "LEVANTER_CATALOG": str(CATALOG),
            "LEVANTER_OVERRIDES": json.dumps(self.overrides()),
        }

    @property
    def store(self) -> ArtifactStore:
        return open_store()


def metadata_of(result: dg.ExecuteInProcessResult) -> dict[str, dict]:
    """Returns the metadata of each materialization of a run, by the asset's key."""
    return {
        event.asset_key.to_user_string(): {
            name: value.value for name, value in event.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
    }


def output_of(result: dg.ExecuteInProcessResult, *key: str) -> Artifact:
    return result.asset_value(dg.AssetKey(list(key)))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    write_texts(root / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(root / "home"))
        patch.delenv("LEVANTER_STORE", raising=False)
        ensure_home()
        yield Chain(root / "home", root / "texts")


@pytest.fixture(scope="session")
def built(chain):
    """The result of the first run of everything."""
    result = chain.run()
    assert result.success
    return result
