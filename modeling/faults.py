"""Named points at which a process can be made to fail, so that tests can prove what survives there.

`LEVANTER_FAULT=during-write@4` kills the process with SIGKILL when it reaches `during-write` at
step 4: no handler runs, nothing is flushed. `before-record@tokenizer` is a point of publishing an
artifact of that kind. `during-write@4:stop` makes the thread that reaches it wait for ever, as a
disk may; `after-step@4:pause` stops the process until it is sent SIGCONT; `during-write@4:ENOSPC`
raises that `OSError`, as a full disk does. Without the variable, `reach` does nothing.
"""

import errno
import os
import re
import signal
import threading

VARIABLE = "LEVANTER_FAULT"

TRAINING = (
    "after-step",  # an update was computed, nothing was saved
    "before-write",  # the attempt's directory exists, no array was written
    "during-write",  # some arrays are written, some are not
    "before-commit",  # all but `COMMIT` is on disk
    "after-commit",  # the checkpoint counts, older ones are not yet removed
    "during-retention",  # an older checkpoint has lost its commit, its arrays are still there
    "before-finish",  # the last checkpoint counts, the result is not yet written
)
"""Where is the number of updates made."""

SENDING = (
    "during-send",  # to a remote store: a file of the checkpoint is there, its `COMMIT` is not
)
"""Where is the number of updates made."""

PUBLISHING = (
    "before-inventory",  # the files lie in the attempt's directory, digested, not yet listed
    "before-sync",  # the inventory lists them, nothing need be on disk
    "before-store",  # the attempt is whole and on disk, but not an object yet
    "during-upload",  # to a remote store: a file of the object is there, its inventory is not
    "before-record",  # the object is whole, no record names it
    "after-record",  # on record; what was left of the build is still there
)
"""Where is the artifact's kind."""


def reach(point: str, where: int | str) -> None:
    """Fails here, at once, if the environment asks for this point at this step or kind."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    match = re.fullmatch(r"([a-z-]+)@([a-z0-9_]+)(?::(stop|pause|E[A-Z]+))?", wanted)
    points = TRAINING + SENDING + PUBLISHING
    ways = {None, "stop", "pause", *errno.errorcode.values()}
    if match is None or match[1] not in points or match[3] not in ways:
        raise ValueError(
            f"{VARIABLE}={wanted!r}: expected <point>@<step or kind>, perhaps with `:stop`, "
            f"`:pause` or an error's name such as `:ENOSPC`; the points are {list(points)}."
        )
    if (match[1], match[2]) == (point, str(where)):
        _fail(match[3])


def _fail(how: str | None) -> None:
    if how == "stop":
        threading.Event().wait()
    elif how == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how is not None:
        number = getattr(errno, how)
        raise OSError(number, os.strerror(number))
    else:
        os.kill(os.getpid(), signal.SIGKILL)
