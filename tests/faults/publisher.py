"""Publishes small artifacts of every kind in processes of its own, to be killed there.

    python publisher.py    answers {"store", "scratch", "kind", "fault"}, a line of JSON on stdin,
                           with a line: the exit code of a fork that published it, or tried to;
                           of {"checkpoint", "url", "visit"} one sends a step checkpoint until it
                           comes to `during-send` for that time

A fork costs milliseconds where an interpreter costs half a second.
"""

import itertools
import json
import os
import sys
from pathlib import Path

from modeling import faults
from modeling.artifacts import ArtifactStore, Built, Recipe, Workspace
from modeling.canonical import digest
from modeling.training.remote import RemoteCheckpoints

sys.path.insert(0, str(Path(__file__).parent))
import bucket


def recipe(kind: str) -> Recipe:
    return Recipe(kind, 1, {"text": kind})


def publish(store: ArtifactStore, kind: str, *, version: str = "", ended: str = "") -> str:
    """Makes an artifact of two files, one a directory below, and returns its content id."""

    def build(workspace: Workspace) -> Built:
        (workspace.output / "part").mkdir()
        (workspace.output / "part" / "a.txt").write_text(version + kind * 100)
        (workspace.output / "b.txt").write_text(version + kind)
        return Built(digest("test", version + kind))

    times = {"times": {"ended": ended}} if ended else {}
    return store.materialize(recipe(kind), build, provenance=times)[0].content_id


def publish_faultily(*, store: str, scratch: str, kind: str, fault: str) -> None:
    os.environ[faults.VARIABLE] = fault
    publish(ArtifactStore(store, scratch=Path(scratch)), kind)


def send(*, checkpoint: str, url: str, visit: int) -> None:
    reach, visits = faults.reach, itertools.count(1)

    def reach_at_last(point: str, where: int | str) -> None:
        if point == "during-send" and next(visits) == visit:
            os.environ[faults.VARIABLE] = f"{point}@{where}"
        reach(point, where)

    faults.reach = reach_at_last
    RemoteCheckpoints(url).send(Path(checkpoint))


def main() -> None:
    bucket.register()
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            send(**order) if "url" in order else publish_faultily(**order)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
