"""How a run trains: steps, batches, precision, mesh, checkpoints. No JAX is imported here."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from modeling.canonical import NOT_IDENTITY, added_later

STRICT = ConfigDict(extra="forbid", strict=True)
Positive = Annotated[int, Field(ge=1)]
AxisMapping = Mapping[str, str | tuple[str, ...]]
"""From logical axes to a mesh axis each, or to several, the slowest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrderConfig:
    """The order in which rows are drawn: a keyed permutation inside each era of `era_rows` rows."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    era_rows: Positive = 65536

    identity_tag: ClassVar[str] = "order.eras/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The run. Fields marked `NOT_IDENTITY` cannot change the science, only the bits or nothing."""

    num_train_steps: Positive
    train_batch_size: Positive
    """Rows per step, over all devices."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the initial weights and of dropout; the data order has its own."""
    mp: str = "p=f32,c=bfloat16"
    """Precision: `p` of parameters, `c` of compute, optionally `o` of outputs (f32, bf16, f16)."""
    num_microbatches: Positive = 1
    """Cuts each batch and sums the gradients, to fit memory."""
    data_order: DataOrderConfig = DataOrderConfig()
    reproducibility: Literal["fast", "elastic"] = dataclasses.field(
        default="fast", metadata=added_later("fast")
    )
    """`fast`: the same bits on equal meshes. `elastic`: on any number of data-parallel devices that
    divides `elastic_shards`, for more memory and some time: see `elastic`."""
    elastic_shards: Positive = dataclasses.field(default=8, metadata=added_later(8))
    """Logical shards of an elastic batch, a power of two; their sums have one fixed order."""

    mesh: Mapping[str, Positive] = dataclasses.field(
        default_factory=lambda: {"data": 1}, metadata=NOT_IDENTITY
    )
    """Devices along each physical axis, slowest first: `{data: 4, model: 2}` takes eight."""
    processes: Positive = dataclasses.field(default=1, metadata=NOT_IDENTITY)
    """Processes that share the mesh's devices evenly, in order."""
    axis_resources: AxisMapping = dataclasses.field(
        default_factory=lambda: {"batch": "data"}, metadata=NOT_IDENTITY
    )
    """Logical to physical axes in compute; `heads: model, mlp: model` is tensor parallelism, and
    `batch: [replica, data]` splits a batch over both."""
    parameter_axis_resources: AxisMapping = dataclasses.field(
        default_factory=lambda: {"embed": "data"}, metadata=NOT_IDENTITY
    )
    """Added to `axis_resources` for parameters and optimizer state: `embed: data` is FSDP."""
    cpu_threads: Positive = dataclasses.field(default=2, metadata=NOT_IDENTITY)
    """Threads that XLA's CPU client splits matrix products over; part of the numerics class."""

    save_every_steps: Positive = dataclasses.field(default=100, metadata=NOT_IDENTITY)
    keep_checkpoints: Annotated[int, Field(ge=2)] = dataclasses.field(
        default=2, metadata=NOT_IDENTITY
    )
    log_every_steps: Positive = dataclasses.field(default=10, metadata=NOT_IDENTITY)

    identity_tag: ClassVar[str] = "trainer/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.reproducibility == "fast" and self.elastic_shards != 8:
            raise ValueError(
                f"elastic_shards: {self.elastic_shards} has no effect while reproducibility is "
                f"`fast`; set reproducibility: elastic, or leave it out."
            )
