"""`levanter ui`: webserver and daemon over one instance, on 127.0.0.1, ended together.

`dagster dev` would start both too, but ignores TERM and leaves its children behind when killed.
The webserver has no authentication and can launch runs, hence no option for another address.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from pipelines.instance import CHECKOUT

_GRACE_S = 10.0


def serve(port: int) -> int:
    """Serves until it is interrupted, or until one of the two ends by itself."""
    workspace = str(CHECKOUT / "workspace.yaml")
    commands = [
        ["dagster-webserver", "-h", "127.0.0.1", "-p", str(port), "-w", workspace],
        ["dagster-daemon", "run", "-w", workspace],
    ]
    scripts = Path(sys.executable).parent
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for name, *options in commands:
            servers.append(subprocess.Popen([scripts / name, *options], start_new_session=True))
        sys.stdout.write(f"Dagster UI on http://127.0.0.1:{port} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
        return max(abs(server.poll() or 0) for server in servers)
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(servers)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(servers: list[subprocess.Popen[bytes]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_GRACE_S)
