"""The processes that train one model together: each holds some devices of one mesh.

They run the same program in step, and meet only in what the devices exchange; `Crew` is the little
that the host side has to agree on. The first process alone talks to people and commits checkpoints.

    launcher     starts `trainer.processes` children and kills all when one dies
    join         ties a child to the others, before its first use of JAX's devices
    Crew         which one this is; what the first one says; whether any was asked to end

A crew of one costs nothing: no device is asked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from modeling.data.loader import rows_of_process
from modeling.data.rows import Rows

HEARTBEAT_S = 60
"""Where no launcher watches, a crew that lost a member ends after so many seconds."""
_WORDS = 64


@dataclasses.dataclass(frozen=True)
class Seat:
    """A process's place in a crew."""

    index: int
    count: int
    address: str
    """`host:port` at which the first process listens."""
    devices: int | None = None
    """Accelerators of this host to take; None where each process sees only its own."""


def join(seat: Mapping[str, Any]) -> None:
    """Waits for the other processes; must come before any use of a device.

    Args:
        seat: the fields of a `Seat`.
    """
    place = Seat(**seat)
    own = place.devices and list(
        range(place.index * place.devices, (place.index + 1) * place.devices)
    )
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=own,
        heartbeat_timeout_seconds=HEARTBEAT_S,
    )


class Crew:
    """The processes of a mesh, as one of them sees them."""

    def __init__(self, mesh: Mesh) -> None:
        """Finds who shares `mesh`."""
        members = sorted({device.process_index for device in mesh.devices.flat})
        if members != list(range(jax.process_count())):
            raise ValueError(
                f"trainer.mesh: {jax.process_count()} processes were started, but the mesh has "
                f"devices of {members} only; make it larger, or start fewer (trainer.processes)."
            )
        self.index, self.count = jax.process_index(), len(members)
        self._said: Any = None
        everyone = Mesh(mesh.devices.reshape(-1), ("device",))
        self._one_each = NamedSharding(everyone, PartitionSpec("device"))
        self._sum = jax.jit(
            lambda flags: jnp.sum(flags, 0), out_shardings=NamedSharding(everyone, PartitionSpec())
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.index == 0

    def said_by_first(self, text: str) -> str:
        """Returns what the first process passes, on every process; at most 256 bytes."""
        if self.count == 1:
            return text
        raw = text.encode()
        if len(raw) > 4 * _WORDS:
            raise ValueError(f"text: {len(raw)} bytes are more than {4 * _WORDS}.")
        words = np.frombuffer(raw.ljust(4 * _WORDS, b"\0"), np.uint32)
        return (
            np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes().rstrip(b"\0").decode()
        )

    def each_says(self, mine: bool) -> list[bool]:
        """Returns what each process says, the same on all of them; waits for all."""
        if self.count == 1:
            return [mine]
        said = multihost_utils.process_allgather(np.array(mine, np.int32))
        return [bool(one) for one in np.asarray(said).reshape(-1)]

    def any_says(self, *mine: bool) -> tuple[bool, ...]:
        """Returns what any process says yes to, the same on all of them.

        Every process must ask the same once an update. Devices add the answers up behind the
        update, so a crew of several acts on those of the call before, known without waiting.
        """
        if self.count == 1:
            return mine
        said = np.tile(np.array(mine, np.int32), (self._one_each.mesh.size, 1))
        flags = jax.make_array_from_callback(said.shape, self._one_each, lambda i: said[i])
        before, self._said = self._said, self._sum(flags)
        return (False,) * len(mine) if before is None else tuple(map(bool, np.asarray(before)))

    def wait_for_all(self, what: str) -> None:
        """Waits until every process has come here."""
        if self.count > 1:
            multihost_utils.sync_global_devices(what)


def placed(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Returns an array that every process has, spread over the devices of all."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed_rows(part: Rows, num_rows: int, sharding: Sharding) -> Any:
    """Returns a batch of `num_rows` rows, spread over the devices of all.

    Args:
        part: the rows that this process's devices hold, in order: see `rows_of_process`.
        num_rows: of the whole batch.
        sharding: where the rows belong.
    """

    def column(array: np.ndarray) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        held = rows_of_process(sharding, *(shape := (num_rows, array.shape[1])))

        def at(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(num_rows)
            here = np.searchsorted(held, begin)
            return array[here : here + end - begin, index[1]]

        return jax.make_array_from_callback(shape, sharding, at)

    return jax.tree_util.tree_map(column, part)
