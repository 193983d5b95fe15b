"""Publishes small artifacts of every kind in processes of its own, to be killed there.

    python publisher.py    answers {"store", "scratch", "kind", "fault"}, a line of JSON on stdin,
                           with a line: the exit code of a fork that published it, or tried to

A fork costs milliseconds where an interpreter costs half a second.
"""

import json
import os
import sys
from pathlib import Path

from modeling import faults
from modeling.artifacts import ArtifactStore, Built, Recipe, Workspace
from modeling.canonical import digest

sys.path.insert(0, str(Path(__file__).parent))
import bucket


def recipe(kind: str) -> Recipe:
    return Recipe(kind, 1, {"text": kind})


def publish(store: ArtifactStore, kind: str, *, version: str = "") -> str:
    """Makes an artifact of two files, one a directory below, and returns its content id."""

    def build(workspace: Workspace) -> Built:
        (workspace.output / "part").mkdir()
        (workspace.output / "part" / "a.txt").write_text(version + kind * 100)
        (workspace.output / "b.txt").write_text(version + kind)
        return Built(digest("test", version + kind))

    return store.materialize(recipe(kind), build)[0].content_id


def main() -> None:
    bucket.register()
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            os.environ[faults.VARIABLE] = order["fault"]
            publish(ArtifactStore(order["store"], scratch=Path(order["scratch"])), order["kind"])
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
