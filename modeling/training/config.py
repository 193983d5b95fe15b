"""How a run trains: steps, batches, precision, mesh, checkpoints. No JAX is imported here."""

import dataclasses
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.fields import STRICT, Positive
from modeling.optim.config import Duration

AxisMapping = Mapping[str, str | tuple[str, ...]]
"""From logical axes to a mesh axis each, or to several, the slowest first."""


def _in_order(stages: Sequence["BatchStage | MixtureStage | LengthStage"]) -> Sequence[Any]:
    starts = [stage.start_step for stage in stages]
    if starts[:1] != [0] or sorted(set(starts)) != starts:
        raise ValueError(f"stages must begin at step 0 and each after the one before, not {starts}")
    return stages


def _some_positive(weights: Mapping[str, float]) -> Mapping[str, float]:
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStage:
    """Batches of `size` rows from the update after `start_step` updates on."""

    start_step: Annotated[int, Field(ge=0)]
    size: Positive

    identity_tag: ClassVar[str] = "batch_stage/1"
    __pydantic_config__ = STRICT


BatchSizes = Annotated[
    Annotated[Positive, Tag("rows")]
    | Annotated[
        tuple[BatchStage, ...], Field(min_length=1), AfterValidator(_in_order), Tag("stages")
    ],
    Discriminator(lambda value: "stages" if isinstance(value, list | tuple) else "rows"),
]
Weights = Annotated[
    Mapping[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]],
    AfterValidator(_some_positive),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """Shares of the sources from the update after `start_step` updates on."""

    start_step: Annotated[int, Field(ge=0)]
    weights: Weights
    """By source; only their ratios count."""

    identity_tag: ClassVar[str] = "mixture_stage/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Sources in given shares, exact in each block of rows: `weights` throughout, or `stages`."""

    weights: Weights | None = None
    """By source; only their ratios count."""
    stages: (
        Annotated[tuple[MixtureStage, ...], Field(min_length=1), AfterValidator(_in_order)] | None
    ) = None
    block_rows: Annotated[int, Field(ge=1, le=2**20)] = 2048

    identity_tag: ClassVar[str] = "mixture/1"
    __pydantic_config__ = STRICT

    def in_stages(self) -> tuple[MixtureStage, ...]:
        """Returns the stages; one where the weights never change."""
        if self.weights is not None:
            return (MixtureStage(start_step=0, weights=self.weights),)
        assert self.stages is not None
        return self.stages


def _one_of_both(mixture: MixtureConfig) -> MixtureConfig:
    if (mixture.weights is None) == (mixture.stages is None):
        raise ValueError("give either weights or stages")
    return mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrderConfig:
    """The order in which rows are drawn: a keyed permutation inside each era of `era_rows` rows."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    era_rows: Positive = 65536
    mixture: Annotated[MixtureConfig, AfterValidator(_one_of_both)] | None = dataclasses.field(
        default=None, metadata=added_later(None)
    )
    """Shares of the dataset's sources; without it an epoch draws each row of every source once."""
    max_epochs: Positive | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """How often a row of any source may be drawn before the run is refused; None for no limit."""

    identity_tag: ClassVar[str] = "order.eras/2"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthStage:
    """Rows cut to `length` tokens from the update after `start_step` updates on."""

    start_step: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=8)]

    identity_tag: ClassVar[str] = "length_stage/1"
    __pydantic_config__ = STRICT


class BatchSchedule:
    """How many rows each step takes, and where in the data order it begins."""

    def __init__(self, sizes: "int | Sequence[BatchStage]") -> None:
        """Takes one size, or stages in order."""
        stages = [BatchStage(start_step=0, size=sizes)] if isinstance(sizes, int) else sizes
        self._stages = list(stages)
        self._cursors = [0]
        for stage, following in pairwise(self._stages):
            steps = following.start_step - stage.start_step
            self._cursors.append(self._cursors[-1] + steps * stage.size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different sizes."""
        return tuple(sorted({stage.size for stage in self._stages}))

    def size(self, step: int) -> int:
        """Returns how many rows the update after `step` updates takes."""
        return self._stages[_stage_at(self._stages, step)].size

    def cursor(self, step: int) -> int:
        """Returns how many rows the first `step` updates take."""
        index = _stage_at(self._stages, step)
        stage = self._stages[index]
        return self._cursors[index] + (step - stage.start_step) * stage.size


def _stage_at(stages: Sequence[BatchStage | LengthStage], step: int) -> int:
    """Returns the index of the stage of the update after `step` updates."""
    if step < 0:
        raise ValueError(f"step {step}: must be at least 0.")
    return bisect_right(stages, step, key=lambda stage: stage.start_step) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the weights, kept beside them."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999

    identity_tag: ClassVar[str] = "average.ema/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailAverageConfig:
    """The plain mean of the weights after each update from `start` on."""

    start: Duration = 0.8
    """Updates to leave out if written as an integer, their share of the run otherwise."""

    identity_tag: ClassVar[str] = "average.tail/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipStepConfig:
    """Leaves out updates whose loss or gradient norm stands out from those just before."""

    sigmas: Annotated[float, Field(gt=0.0)] = 6.0
    """Standard deviations above the mean that are too many."""
    window: Annotated[int, Field(ge=8)] = 128
    """Updates that mean and deviation are taken of; before so many, none is left out."""

    identity_tag: ClassVar[str] = "skip_step/1"
    __pydantic_config__ = STRICT


class LengthSchedule:
    """How many tokens of its rows each step takes."""

    def __init__(self, stages: Sequence[LengthStage], row_length: int) -> None:
        """Takes stages in order; whole rows without any."""
        for number, stage in enumerate(stages):
            if stage.length > row_length:
                raise ValueError(
                    f"trainer.sequence_length_schedule.{number}.length: {stage.length} tokens, but "
                    f"rows have {row_length} (sequence_length); take at most as many."
                )
        whole = LengthStage(start_step=0, length=row_length)
        self._stages = list(stages) or [whole]

    def length(self, step: int) -> int:
        """Returns how many tokens of a row the update after `step` updates takes."""
        return self._stages[_stage_at(self._stages, step)].length

    def tokens(self, updates: int, batches: BatchSchedule) -> int:
        """Returns how many tokens the first `updates` updates take."""
        begins = [min(stage.start_step, updates) for stage in self._stages]
        return sum(
            (batches.cursor(end) - batches.cursor(begin)) * stage.length
            for stage, begin, end in zip(self._stages, begins, [*begins[1:], updates], strict=True)
        )


_DTYPES = {
    "f32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "f16": "float16",
    "float16": "float16",
}


def precision(text: str) -> Mapping[str, str]:
    """Returns the names of the dtypes of `p=<dtype>,c=<dtype>`, parameters and compute, by letter.

    Raises:
        ValueError: naming the part that cannot be read, or lacks.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        letter, _, dtype = (piece.strip() for piece in part.partition("="))
        if letter == "o":
            raise ValueError(
                f"trainer.mp: {text!r}: {part.strip()!r} would change nothing, since training "
                f"hands out losses alone, which are in float32 whatever the policy; leave it out."
            )
        if letter not in ("p", "c") or dtype not in _DTYPES or letter in given:
            raise ValueError(
                f"trainer.mp: {text!r}: cannot read {part!r}; write p= and c= once each, with one "
                f"of {sorted(_DTYPES)}, e.g. `p=f32,c=bfloat16`."
            )
        given[letter] = _DTYPES[dtype]
    missing = [letter for letter in "pc" if letter not in given]
    if missing:
        raise ValueError(
            f"trainer.mp: {text!r} lacks `{missing[0]}=`; write e.g. `p=f32,c=bfloat16`."
        )
    return given


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _with_unit(interval: Any) -> Any:
    if not isinstance(interval, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,3})?[smh]", interval):
        raise ValueError(
            f"{interval!r} is no time: write it with its unit, 90s, 10m or 1h. A number of updates "
            f"belongs in trainer.save_every_steps"
        )
    if not float(interval[:-1]):
        raise ValueError(f"{interval!r}: it must be longer than no time at all")
    return interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Keeps the checkpoint of every so many updates, of the updates up to `until`."""

    every: Positive
    until: Positive | None = None
    """The last update that this rule speaks of, the next one of those after; None for no end."""

    __pydantic_config__ = STRICT


def _until_in_order(rules: Sequence[KeepConfig]) -> Sequence[KeepConfig]:
    ends = [math.inf if rule.until is None else rule.until for rule in rules]
    if sorted(set(ends)) != ends:
        shown = [rule.until for rule in rules]
        raise ValueError(
            f"each rule speaks of the updates after those of the one before, so `until` must rise "
            f"and only the last rule may lack it, not {shown}"
        )
    return rules


def _xla_flag(flag: str) -> str:
    if not re.fullmatch(r"--xla_[a-z0-9_]+(=[\w.,:/+-]+)?", flag):
        raise ValueError(f"{flag!r} is no flag of XLA: write it --xla_name=value, one an entry")
    if flag.startswith("--xla_force_host_platform_device_count"):
        raise ValueError(f"{flag!r}: how many devices there are is said by trainer.mesh")
    return flag


WeightsChoice = Literal["last", "ema", "tail_average"]
"""Those after the last update, or an average that the trainer keeps."""


STEP = "step"
"""The array of a state that counts its updates."""
TOKENIZER = "tokenizer"
"""What `allow_changed` calls the tokenizer, which is looked for in lineages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitializeFromConfig:
    """Another run's checkpoint to go on from: its weights, optimizer, step and place in the data.

    Everything must be as it was there but `num_train_steps` and what `allow_changed` names.
    """

    checkpoint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Its content id, which `levanter status` and the asset's metadata show."""
    weights_only: bool = False
    """Takes the weights alone and begins at step 0; all but the tokenizer is free to differ."""
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = dataclasses.field(
        default=None, metadata=added_later(None)
    )
    """Takes these arrays alone, `model.embeddings`, or all within, `model`; the others begin as in
    a new run. It goes on with the checkpoint's step and data if `step` is among them; otherwise it
    begins at step 0, and all but the tokenizer is free to differ."""
    allow_changed: tuple[str, ...] = dataclasses.field(default=(), metadata=NOT_IDENTITY)
    """Fields, or sections of them, such as `optimizer`; `data` for the rows, and `tokenizer` where
    ids may stand for other text. A guard."""

    identity_tag: ClassVar[str] = "initialize_from/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        needless = [field for field in self.allow_changed if field != TOKENIZER]
        if self.weights_only and self.only is not None:
            raise ValueError(
                f"weights_only: true takes what `only: [model]` does, but only names "
                f"{list(self.only)}; leave one of them out."
            )
        if not self.goes_on and needless:
            what = "weights_only: true" if self.weights_only else "`only` without `step`"
            raise ValueError(
                f"{what} leaves all but the tokenizer free to differ, but allow_changed names "
                f"{needless}; leave one of them out."
            )

    @property
    def goes_on(self) -> bool:
        """Whether the run begins at the checkpoint's step; else it begins at step 0."""
        return not self.weights_only and (self.only is None or STEP in self.only)

    @property
    def allows_other_tokenizer(self) -> bool:
        """Whether ids may stand for other text than where the weights come from."""
        return TOKENIZER in self.allow_changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The run. Fields marked `NOT_IDENTITY` cannot change the science, only the bits or nothing."""

    num_train_steps: Positive
    train_batch_size: BatchSizes
    """Rows per step, over all devices; or stages, `[{start_step: 0, size: 16}, ...]`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the initial weights and of dropout; the data order has its own."""
    mp: str = "p=f32,c=bfloat16"
    """Precision: `p` of parameters, `c` of compute (f32, bf16, f16)."""
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
    initialize_from: InitializeFromConfig | None = dataclasses.field(
        default=None, metadata=added_later(None)
    )
    """A checkpoint to begin with, instead of random weights."""
    ema: EmaConfig | None = dataclasses.field(default=None, metadata=added_later(None))
    """Kept in checkpoints as `averages.ema`."""
    tail_average: TailAverageConfig | None = dataclasses.field(
        default=None, metadata=added_later(None)
    )
    """Kept in checkpoints as `averages.tail_average`."""
    skip_step: SkipStepConfig | None = dataclasses.field(default=None, metadata=added_later(None))
    sequence_length_schedule: (
        Annotated[tuple[LengthStage, ...], Field(min_length=1), AfterValidator(_in_order)] | None
    ) = dataclasses.field(default=None, metadata=added_later(None))
    """Trains on the first so many tokens of each row, the rest of which is not used; on whole rows
    when absent."""

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
    deterministic: bool = dataclasses.field(default=True, metadata=NOT_IDENTITY)
    """False lets a GPU take faster kernels that sum in no fixed order, chosen by stopwatch: a class
    of its own, in which a second run may give other bits."""
    xla_flags: tuple[Annotated[str, AfterValidator(_xla_flag)], ...] = dataclasses.field(
        default=(), metadata=NOT_IDENTITY
    )
    """Added to those that every run is given, `[--xla_gpu_enable_latency_hiding_scheduler=true]`;
    part of the numerics class. XLA ends a process that gives it a flag it does not know."""

    other_numerics: Literal["continue", "begin_anew"] = dataclasses.field(
        default="continue", metadata=NOT_IDENTITY
    )
    """What to do where the newest work is of another numerics class, and none of this one: go on
    with it, which the record then tells, or leave it and keep to one class."""

    save_every_steps: Positive | None = dataclasses.field(default=100, metadata=NOT_IDENTITY)
    """Updates between two checkpoints; None to save by `save_interval` and `keep` alone."""
    save_interval: Annotated[str, BeforeValidator(_with_unit)] | None = dataclasses.field(
        default=None, metadata=NOT_IDENTITY
    )
    """Time after which a checkpoint is saved besides, `90s`, `10m` or `1h`."""
    keep: Annotated[tuple[KeepConfig, ...], AfterValidator(_until_in_order)] = dataclasses.field(
        default=(), metadata=NOT_IDENTITY
    )
    """Checkpoints that stay for ever: `[{every: 1000, until: 10000}, {every: 5000}]`."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = dataclasses.field(
        default=2, metadata=NOT_IDENTITY
    )
    """How many of the newest verified ones stay besides; older ones are removed."""
    begin_anew_if_damaged: bool = dataclasses.field(default=False, metadata=NOT_IDENTITY)
    """Whether a run of whose checkpoints none can be read begins at step 0; else it is refused."""
    preemption_grace_s: Annotated[float, Field(gt=0)] = dataclasses.field(
        default=50.0, metadata=NOT_IDENTITY
    )
    """From the signal that asks a process to end, to its end whether it has saved or not."""
    log_every_steps: Positive = dataclasses.field(default=10, metadata=NOT_IDENTITY)
    eval_every_steps: Positive | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """How often the loss on validation rows is taken during training, split by split."""
    eval_max_rows: Positive = dataclasses.field(default=64, metadata=NOT_IDENTITY)
    """Of each validation split, evenly spaced."""
    pictures_every_steps: Positive | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """How often a page is drawn of how well the model foresees each token of a few rows."""
    profile_steps: Annotated[str, Field(pattern=r"^\d{1,9}\.\.\d{1,9}$")] | None = (
        dataclasses.field(default=None, metadata=NOT_IDENTITY)
    )
    """The first and the last update to profile: `5..10`. `levanter run --profile-steps 5..10`."""

    identity_tag: ClassVar[str] = "trainer/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.reproducibility == "fast" and self.elastic_shards != 8:
            raise ValueError(
                f"elastic_shards: {self.elastic_shards} has no effect while reproducibility is "
                f"`fast`; set reproducibility: elastic, or leave it out."
            )
        if self.reproducibility == "elastic" and not self.deterministic:
            raise ValueError(
                "deterministic: false gives no bits to keep, but reproducibility: elastic asks for "
                "the same ones on any number of devices; leave one of them out."
            )

    def lengths(self, row_length: int) -> LengthSchedule:
        """Returns how many tokens of rows of `row_length` each step takes."""
        return LengthSchedule(self.sequence_length_schedule or (), row_length)

    @property
    def save_interval_s(self) -> float | None:
        """The interval in seconds."""
        if self.save_interval is None:
            return None
        return float(self.save_interval[:-1]) * _SECONDS[self.save_interval[-1]]

    @property
    def batches(self) -> BatchSchedule:
        """The batch size by step."""
        return BatchSchedule(self.train_batch_size)
