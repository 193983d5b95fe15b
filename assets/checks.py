"""How a check is made: it reads an artifact back and names what is wrong with it.

A check is blocking with severity ERROR: a bad artifact does not flow on, and the run fails. It
first compares every stored byte with the artifact's inventory, then asks what only this stage can
answer.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import dagster as dg

from assets.catalog import guarded
from modeling.artifacts import Artifact
from modeling.inventory import DamagedArtifactError, verify_files
from resources.secrets import scrub
from resources.store import StoreResource

FindFaults = Callable[[Artifact, Path, StoreResource], Iterable[str]]
_SHOWN_FAULTS = 20


def artifact_check(
    key: dg.AssetKey, name: str, description: str, find_faults: FindFaults
) -> dg.AssetChecksDefinition:
    """Returns a blocking check of the asset `key`.

    Args:
        key: the asset.
        name: of the check.
        description: what holds when it passes, as one sentence.
        find_faults: yields a line for each thing that is wrong.
    """

    def check(artifact: Artifact, store: StoreResource) -> dg.AssetCheckResult:
        return verdict(description, _all_faults(artifact, store, find_faults))

    return dg.asset_check(asset=key, name=name, description=description, blocking=True)(
        guarded(check, dg.AssetCheckExecutionContext)
    )


def verdict(description: str, faults: list[str], **found: int | float) -> dg.AssetCheckResult:
    """Returns what a check returns: passed without faults, else an ERROR that names them.

    Args:
        description: what holds when there are no faults.
        faults: a line for each thing that is wrong.
        found: figures to show.
    """
    shown = [scrub(fault) for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > len(shown):
        shown.append(f"... and {len(faults) - len(shown)} more.")
    return dg.AssetCheckResult(
        passed=not faults,
        severity=dg.AssetCheckSeverity.ERROR,
        description="\n".join(shown) if faults else description,
        metadata={"num_faults": len(faults), **found},
    )


def _all_faults(artifact: Artifact, store: StoreResource, find_faults: FindFaults) -> list[str]:
    try:
        files = store.files(artifact)
        verify_files(files)
        return list(find_faults(artifact, files, store))
    except (DamagedArtifactError, ValueError, KeyError, OSError) as error:
        # What cannot be read is a fault of the artifact, and the check's answer.
        return [f"{type(error).__name__}: {error}"]
