"""Who is building what: a lease that whoever wants the same sees, waits for, and takes over.

    work/<recipe_id>/<numerics>.lock      a lock of the kernel's, dropped when its holder dies;
                                          holds the id of the lease
    leases/<recipe_id>/<numerics>.json    in the store: id, host, pid, since, beat, doing,
                                          inputs: what no collection of garbage may take meanwhile

The lock keeps two builders on one machine out of one work directory: a matter of correctness. The
lease is one of thrift alone: it spares hosts that share a store the same work, and says who has it.
Both may end up building all the same, since publishing decides who was first, and loses nothing.

A holder counts `beat` up every `renew_s`. It is taken for gone once somebody else has *seen* no
change for `expire_s` by his own clock, so that no two clocks are compared; at once if it was on
this host and its lock is free. A holder that finds its lease in other hands says so and goes on.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modeling.notes import Note
from modeling.progress import Report

_LOG = logging.getLogger(__name__)
_TOLD_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Terms:
    """How often a lease is renewed, and how long one waits for that."""

    renew_s: float = 10.0
    expire_s: float = 60.0
    poll_s: float = 0.2
    """Between looks at the lock; the lease is looked at ten times as seldom."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a lease, in his own words."""

    id: str
    host: str
    pid: int
    since: str
    beat: int
    doing: str
    """How far the work has come."""
    inputs: Sequence[Sequence[str]] = ()
    """Kind and content id of each artifact that is read."""

    def __str__(self) -> str:
        doing = f": {self.doing}" if self.doing else ""
        return f"process {self.pid} on {self.host}, since {self.since}{doing}"


def holder_of(note: Note) -> Holder | None:
    """Returns who has a lease; None if nobody has."""
    content = note.read()
    if content is None:
        return None
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        # Being written, or damaged: whoever it is, silence will tell.
        return Holder("", "a host that cannot be read", 0, "?", hash(content), "")


def has_ended(note: Note, lock: Path, terms: Terms) -> bool:
    """Whether nobody is at work under a lease; takes nothing from anybody.

    Waits for a sign of life where the holder was on another host.
    """
    with lock.open("a+") as handle:
        if not _try_lock(handle):
            return False
    watch, seen = Watch(terms.expire_s), holder_of(note)
    found = seen
    while found is not None and found.host != socket.gethostname():
        if watch.has_expired(found):
            return True
        if seen is not None and (found.id, found.beat) != (seen.id, seen.beat):
            return False
        time.sleep(10 * terms.poll_s)
        found = holder_of(note)
    return True


@contextlib.contextmanager
def held(
    note: Note,
    lock: Path,
    terms: Terms,
    *,
    inputs: Sequence[Sequence[str]] = (),
    doing: Callable[[], str],
    report: Report,
) -> Iterator[None]:
    """Holds lock and lease; waits for whoever has them, and says who.

    Args:
        note: the lease.
        lock: the lock beside the work directory.
        terms: how long to wait.
        inputs: kind and content id of each artifact that is read.
        doing: says how far the work has come.
        report: hears who is waited for.
    """
    with lock.open("a+") as handle:
        mine = _acquire(note, handle, terms, inputs, report)
        ended = threading.Event()
        arguments = (note, mine, terms.renew_s, doing, ended)
        beating = threading.Thread(target=_renew, args=arguments, daemon=True, name="lease")
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            _release(note, mine)


def _acquire(
    note: Note, lock: Any, terms: Terms, inputs: Sequence[Sequence[str]], report: Report
) -> Holder:
    """Waits for lock and lease, and returns what the lease now says."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, 0, "", inputs)
    watch, has_lock, look_at, tell_at = Watch(terms.expire_s), False, 0.0, 0.0
    other: Holder | None = None
    while True:
        had_lock, has_lock = has_lock, has_lock or _try_lock(lock)
        now = time.monotonic()
        if now >= look_at or has_lock != had_lock:
            look_at = now + 10 * terms.poll_s
            other = holder_of(note)
            if (
                has_lock
                and _may_take(other, mine, lock, watch, report)
                and _take(note, other, mine)
            ):
                lock.truncate(0)
                lock.write(mine.id)
                lock.flush()
                return mine
        if now >= tell_at:
            tell_at = now + _TOLD_EVERY_S
            report(f"Waiting for the same work, which is done by {other or 'another process'}.")
        time.sleep(terms.poll_s)


def _try_lock(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _may_take(
    other: Holder | None, mine: Holder, lock: Any, watch: "Watch", report: Report
) -> bool:
    """Whether nobody is at work; the lock is ours."""
    if other is None:
        return True
    lock.seek(0)
    # It had this very lock, and the kernel has taken it away.
    has_died = other.host == mine.host and other.id == lock.read()
    if has_died or watch.has_expired(other):
        report(f"Taking over from {other}: it has {'died' if has_died else 'fallen silent'}.")
        return True
    return False


class Watch:
    """Sees whether a lease is renewed, by one clock alone."""

    def __init__(self, expire_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Has seen nothing yet."""
        self._expire_s = expire_s
        self._clock = clock
        self._seen: tuple[str, int] | None = None
        self._since = 0.0

    def has_expired(self, holder: Holder) -> bool:
        """Whether this very lease was shown for the first time long enough ago."""
        seen, now = (holder.id, holder.beat), self._clock()
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since >= self._expire_s


def _take(note: Note, other: Holder | None, mine: Holder) -> bool:
    """Makes the lease ours, unless somebody else is quicker."""
    if other is None:
        note.create(_content(mine))
    elif (now := holder_of(note)) is None or (now.id, now.beat) == (other.id, other.beat):
        note.replace(_content(mine))
    found = holder_of(note)
    return found is not None and found.id == mine.id


def _renew(
    note: Note, mine: Holder, renew_s: float, doing: Callable[[], str], ended: threading.Event
) -> None:
    beat = 0
    while not ended.wait(renew_s):
        try:
            found = holder_of(note)
            if found is not None and found.id != mine.id:
                _LOG.warning(
                    "This work is now also done by %s: no harm, but twice the cost.", found
                )
                return
            beat += 1
            note.replace(_content(dataclasses.replace(mine, beat=beat, doing=doing())))
        except Exception as error:  # noqa: BLE001 (of any file system; the work is not to end by it)
            _LOG.warning("A lease was not renewed (%s); trying again in %g s.", error, renew_s)


def _release(note: Note, mine: Holder) -> None:
    try:
        found = holder_of(note)
        if found is not None and found.id == mine.id:
            note.remove()
    except Exception as error:  # noqa: BLE001 (as above: it expires)
        _LOG.warning("A lease was not given back (%s); it will expire.", error)


def _content(holder: Holder) -> bytes:
    return (json.dumps(dataclasses.asdict(holder), indent=2, ensure_ascii=False) + "\n").encode()
