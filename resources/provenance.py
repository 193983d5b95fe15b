"""Where and how an artifact was made, for its record; outside every identity, and free of secrets.

    git       commit, branch, remote without credentials; the uncommitted difference, without
              secrets and at most 64 KiB of it, and the SHA-256 of all of it
    packages  versions of everything installed
    host      machine, processor count, Python
    process   argv with secrets removed
    times     when the build started and ended (UTC), seconds
    cost      seconds by the clock; of processors, here and in the processes that were waited for;
              and of devices: how many of them were held for how long, over all launches

Environment variables are never copied; what arguments lose says `secrets`.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from modeling.artifacts import Artifact, ArtifactStore, Build, Built, Recipe, Workspace
from modeling.progress import Report, ignore
from resources.secrets import scrub, without_secrets

CHECKOUT = Path(__file__).resolve().parent.parent

_MOST_DIFF = 1 << 16
"""Characters of an uncommitted difference that are kept; its digest is of all of it."""
_MOST_UNTRACKED = 200


def materialize(
    store: ArtifactStore,
    recipe: Recipe,
    build: Build,
    *,
    numerics: Mapping[str, Any] | None = None,
    begun_as: Sequence[Recipe] = (),
    report: Report = ignore,
) -> tuple[Artifact, bool, float]:
    """Returns the artifact, whether it had to be built, and the seconds that it took."""
    began = time.monotonic()
    provenance: dict[str, Any] = {}

    def build_with_provenance(workspace: Workspace) -> Built:
        start, cpu_before = datetime.datetime.now(datetime.UTC), _cpu_seconds()
        # Gathered before the build: it tells of the sources that ran and not of later edits.
        provenance.update(collect(sys.argv))
        built = build(workspace)
        end = datetime.datetime.now(datetime.UTC)
        provenance["times"] = {
            "started": start.isoformat(timespec="seconds"),
            "ended": end.isoformat(timespec="seconds"),
            "seconds": round((end - start).total_seconds(), 3),
        }
        provenance["cost"] = {
            "wall_s": provenance["times"]["seconds"],
            "cpu_s": round(_cpu_seconds() - cpu_before, 3),
            "device_s": built.facts.get("device_s", 0.0),
        }
        return built

    artifact, is_new = store.materialize(
        recipe,
        build_with_provenance,
        numerics=numerics,
        provenance=provenance,
        begun_as=begun_as,
        report=report,
    )
    return artifact, is_new, time.monotonic() - began


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def collect(argv: Sequence[str]) -> dict[str, Any]:
    """Returns git state, package versions, host and arguments of this process."""
    return {
        "git": git_state(CHECKOUT),
        "packages": package_versions(),
        "host": {
            "name": socket.gethostname(),
            "machine": platform.machine(),
            "system": platform.platform(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "process": {"argv": without_secrets(argv)},
    }


def git_state(directory: Path) -> dict[str, Any]:
    """Returns commit, branch, remote and a digest of what is not committed; says so without git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "why": f"{directory.name} is no git checkout, or git is missing"}
    status = _git(directory, "status", "--porcelain=v1", "--untracked-files=normal") or ""
    remote = _git(directory, "config", "--get", "remote.origin.url")
    return {
        "commit": commit,
        "branch": _git(directory, "rev-parse", "--abbrev-ref", "HEAD"),
        "remote": _public_remote(remote) if remote else None,
        "dirty": bool(status),
        "diff_sha256": None,
    } | (_difference(directory, status) if status else {})


def _difference(directory: Path, status: str) -> dict[str, Any]:
    """Returns the difference to HEAD, and the names of untracked files, whose bytes may be many."""
    whole = _git(directory, "diff", "HEAD", "--binary", "--no-ext-diff") or ""
    shown = _git(directory, "diff", "HEAD", "--no-ext-diff", "--no-color") or ""
    untracked = (_git(directory, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    clean = scrub(shown)
    left_out = max(len(clean) - _MOST_DIFF, 0)
    return {
        "diff_sha256": hashlib.sha256(f"{status}\0{whole}".encode()).hexdigest(),
        "diff": clean[:_MOST_DIFF],
        "diff_characters_left_out": left_out,
        "untracked": [scrub(name) for name in untracked[:_MOST_UNTRACKED]],
        "num_untracked": len(untracked),
    }


@functools.cache
def repository_page() -> str | None:
    """Returns the page of the commit that is checked out, if its host is known to have one."""
    remote = _git(CHECKOUT, "config", "--get", "remote.origin.url")
    commit = _git(CHECKOUT, "rev-parse", "HEAD")
    found = remote and re.fullmatch(
        r"(?:\w+://)?(github\.com|gitlab\.com)[/:](.+?)(?:\.git)?/?", _public_remote(remote)
    )
    # An installed package may lie within another repository.
    is_checkout = _git(CHECKOUT, "rev-parse", "--show-prefix") == ""
    if not (found and commit and is_checkout):
        return None
    host, name = found.groups()
    return f"https://{host}/{name}/{'-/' if host == 'gitlab.com' else ''}blob/{commit}"


def code_url(path: str, line: int) -> str | None:
    """Returns the address of a line of this checkout's code; None if it has no known host."""
    repository = repository_page()
    if repository is None:
        return None
    return f"{repository}/{Path(path).resolve().relative_to(CHECKOUT).as_posix()}#L{line}"


def _public_remote(remote: str) -> str:
    """Returns a remote's URL without user, password and query, which may all carry a token."""
    if "://" not in remote:
        return scrub(remote.rpartition("@")[2])
    parts = urlsplit(remote)
    host = parts.netloc.rpartition("@")[2]
    return scrub(urlunsplit((parts.scheme, host, parts.path, "", "")))


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"`{shlex.join(command)}` took more than 60 s.") from error
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


@functools.cache
def package_versions() -> Mapping[str, str]:
    """Returns the version of every installed package, by its name as PyPI writes it."""
    found = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version
        for one in importlib.metadata.distributions()
    }
    return dict(sorted(found.items()))
