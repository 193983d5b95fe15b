"""`levanter ui` serves the graph on this machine alone, and leaves nothing behind when it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ASSETS = "query { assetNodes { assetKey { path } } }"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port: int, query: str) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def wait_until_served(port: int, server: subprocess.Popen, limit_s: float = 240) -> dict:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server has ended by itself"
        try:
            return ask(port, ASSETS)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(f"nothing is served on port {port} after {limit_s} s")


def stat_of(pid: int) -> list[str] | None:
    """Returns state, parent and the rest of a process, as proc(5) lists them, while it is there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> set[int]:
    """Returns every process below `pid`, in whatever session."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_of(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found, todo = set(), [pid]
    while todo:
        above = todo.pop()
        below = {child for child, parent in parents.items() if parent == above} - found
        found |= below
        todo += below
    return found


def is_running(pid: int) -> bool:
    fields = stat_of(pid)
    return fields is not None and fields[0] != "Z"


def test_it_serves_the_catalog_locally_and_ends_with_its_children(chain, tmp_path):
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "ui", "--port", str(port)],
            env={**os.environ, **chain.environment()},
            stdout=log,
            stderr=log,
        )
        try:
            nodes = wait_until_served(port, server)["assetNodes"]
            keys = {"/".join(node["assetKey"]["path"]) for node in nodes}
            assert {"tales/tokenizer", "tiny/checkpoint", "tiny/hf_model"} <= keys
            addresses = socket.gethostbyname_ex(socket.gethostname())[2]
            for address in set(addresses) - {"127.0.0.1", "127.0.1.1"}:
                with socket.socket() as caller:
                    assert caller.connect_ex((address, port)) != 0
            children = descendants(server.pid)
            assert len(children) >= 2
            server.send_signal(signal.SIGTERM)
            assert server.wait(90) == 0
        finally:
            server.kill()
            server.wait()
    deadline = time.monotonic() + 60
    while (left := {pid for pid in children if is_running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == set()
