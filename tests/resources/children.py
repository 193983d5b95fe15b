"""Entries that launched processes run in the launcher's tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from modeling.training.preemption import Preempted, PreemptionNotice


def write_and_return(arguments, workspace, channel):
    channel.say("working on it")
    (workspace.output / "data.txt").write_text(arguments["text"])
    return {
        "content_id": "ab" * 32,
        "roots": {},
        "facts": {"nproc": os.environ.get("NPROC"), "group": os.getpgrp() == os.getpid()},
        "leaves": {},
    }


def exit_17(arguments, workspace, channel):
    sys.stderr.write("the last words\n")
    sys.exit(17)


def exit_0_early(arguments, workspace, channel):
    os._exit(0)


def fail(arguments, workspace, channel):
    raise ValueError("hidden_dim 7 is not a multiple of num_heads 2")


def crash_once(arguments, workspace, channel):
    """Dies by SIGKILL in its first life; the second finds what the first has committed."""
    mark = workspace.progress / "step"
    if not mark.exists():
        mark.write_text("5")
        os.kill(os.getpid(), signal.SIGKILL)
    return {
        "content_id": "cd" * 32,
        "roots": {},
        "facts": {"resumed": int(mark.read_text())},
        "leaves": {},
    }


def preempted(arguments, workspace, channel):
    raise Preempted(7)


def segfault(arguments, workspace, channel):
    os.kill(os.getpid(), signal.SIGSEGV)


def stop_when_asked(arguments, workspace, channel):
    """Saves for `save_s` after a TERM, then stops; says in files what happened to it."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    notes = Path(arguments["notes"])
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (notes / "pids").write_text(f"{os.getpid()} {grandchild.pid}")
    (notes / "started").touch()
    while not told:
        time.sleep(0.05)
    (notes / "told").touch()
    for line in ("I was told to stop.", "So I save."):
        channel.say(line)
    deadline = time.monotonic() + arguments["save_s"]
    while time.monotonic() < deadline:
        time.sleep(0.05)
    grandchild.kill()
    grandchild.wait()
    (notes / "saved").touch()
    raise Preempted(7)


def save_when_asked(arguments, workspace, channel):
    """Saves for `save_s` as training does, which a second signal would end at once."""
    notes = Path(arguments["notes"])
    (notes / "pids").write_text(str(os.getpid()))
    with PreemptionNotice(grace_s=60) as notice:
        (notes / "started").touch()
        while not notice.given:
            time.sleep(0.02)
        (notes / "told").touch()
        time.sleep(arguments["save_s"])
        (notes / "saved").touch()
    raise Preempted(7)


def crew_of_two(arguments, workspace, channel):
    """In its first life the second process dies and the first one waits; then both meet."""
    import jax
    from jax.experimental import multihost_utils

    sleeper, died = workspace.progress / "pid", workspace.progress / "died"
    index = jax.process_index()
    channel.say(f"process {index} of {jax.process_count()}")
    if index == 0 and not died.exists():
        sleeper.write_text(str(os.getpid()))
        time.sleep(600)
    if index == 1 and not died.exists():
        while not sleeper.exists():
            time.sleep(0.02)
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    ranks = multihost_utils.process_allgather(jax.numpy.asarray(index)).tolist()
    if index == 1:
        return {"ranks": "the second process has no say"}
    return {"ranks": ranks, "orphan": Path(f"/proc/{sleeper.read_text()}").exists()}
