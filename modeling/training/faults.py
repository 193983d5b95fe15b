"""Named points at which a run can be made to die, so that tests can prove it survives there.

`LEVANTER_FAULT=during-write@4` kills the process with SIGKILL when it reaches `during-write` at
step 4: no handler runs, nothing is flushed. `during-write@4:stop` makes the thread that reaches it
wait for ever, as a disk may. Without the variable, `reach` does nothing.
"""

import os
import re
import signal
import threading

VARIABLE = "LEVANTER_FAULT"

POINTS = (
    "after-step",  # an update was computed, nothing was saved
    "before-write",  # the attempt's directory exists, no array was written
    "during-write",  # some arrays are written, some are not
    "before-commit",  # all but `COMMIT` is on disk
    "after-commit",  # the checkpoint counts, older ones are not yet removed
    "during-retention",  # an older checkpoint has lost its commit, its arrays are still there
    "before-finish",  # the last checkpoint counts, the result is not yet written
)


def reach(point: str, step: int) -> None:
    """Dies here, at once, if the environment asks for this point at this step."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    match = re.fullmatch(r"([a-z-]+)@(\d+)(:stop)?", wanted)
    if match is None or match[1] not in POINTS:
        raise ValueError(
            f"{VARIABLE}={wanted!r}: expected <point>@<step> with one of the points {list(POINTS)}."
        )
    if match[1] == point and int(match[2]) == step:
        if match[3]:
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL)
