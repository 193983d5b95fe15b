"""What the fields of a run must be to each other, told before anything is computed.

A corpus is tokenized for hours before training begins, and a program compiles for minutes: what the
fields alone can tell is told when an experiment is read, each mistake by its field, all at once.
What only devices, rows or arrays can tell is told where they are first known: see `mesh`. No JAX is
imported here.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence

from modeling.optim import phases
from modeling.optim.config import AbstractSophiaConfig, OptimizerConfig
from modeling.training.config import BatchStage, LengthStage, TrainerConfig, precision

MAPPINGS = ("axis_resources", "parameter_axis_resources")


def mistakes(
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    sequence_length: int,
    axis_names: Collection[str],
) -> Sequence[str]:
    """Returns what is wrong with the fields of a run: the first mistake of each kind.

    Args:
        trainer: how it is trained.
        optimizer: by which rule.
        sequence_length: tokens of a row.
        axis_names: of the model's arrays and of the rows.
    """
    num_steps = trainer.num_train_steps

    def averaging() -> None:
        if trainer.tail_average is not None:
            start = trainer.tail_average.start
            phases.duration_steps(start, num_steps, "trainer.tail_average.start")

    checks: list[Callable[[], object]] = [
        lambda: precision(trainer.mp),
        lambda: phases.require_fitting(optimizer.schedule, num_steps),
        averaging,
        lambda: _require_stages_begin(trainer),
        lambda: trainer.lengths(sequence_length),
        lambda: profiled_steps(trainer.profile_steps, num_steps),
        lambda: _require_layout(trainer, optimizer),
        lambda: require_known_axes(trainer, axis_names),
    ]
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found


def profiled_steps(text: str | None, num_steps: int) -> range:
    """Returns the updates that `5..10` names, both ends included; none for None.

    Raises:
        ValueError: the run of `num_steps` updates has none of these.
    """
    if text is None:
        return range(0)
    first, last = map(int, text.split(".."))
    if not 1 <= first <= last <= num_steps:
        raise ValueError(
            f"trainer.profile_steps: {text} is no part of the updates 1..{num_steps} of this run; "
            f"name the first and the last one to profile, e.g. 5..10."
        )
    return range(first, last + 1)


def require_layout(trainer: TrainerConfig) -> None:
    """Raises `ValueError` unless processes, mappings and batches fit the mesh."""
    devices_per_process(trainer)
    sizes = dict(trainer.mesh)
    for field, logical, physical in entries(trainer):
        for name in physical:
            if name not in sizes:
                raise ValueError(
                    f"trainer.{field}: `{logical}: {name}` names a mesh axis that is not in "
                    f"trainer.mesh, which has {sorted(sizes)}{hint(name, sizes)}; map to one of "
                    f"those or add `{name}` to the mesh."
                )
        if not physical or len(set(physical)) < len(physical):
            raise ValueError(
                f"trainer.{field}: `{logical}: {list(physical)}` must name one or more mesh axes, "
                f"each once."
            )
    for size in trainer.batches.sizes:
        _require_shared_batch(size, trainer)


def require_known_axes(trainer: TrainerConfig, known: Collection[str]) -> None:
    """Raises `ValueError` if a mapping splits an axis that neither model nor batch has.

    Such a line does nothing, and would leave whole what was meant to be split.
    """
    for field, logical, _ in entries(trainer):
        if logical not in known:
            raise ValueError(
                f"trainer.{field}: no array of this model has an axis `{logical}`"
                f"{hint(logical, known)}; there are {sorted(known)}."
            )


def devices_per_process(trainer: TrainerConfig) -> int:
    """Returns how many of the mesh's devices each process has."""
    needed = math.prod(trainer.mesh.values())
    if needed % trainer.processes:
        raise ValueError(
            f"trainer.processes: {trainer.processes} processes cannot share the {needed} devices "
            f"of trainer.mesh {dict(trainer.mesh)} evenly; take a divisor of {needed}."
        )
    return needed // trainer.processes


def require_elastic(trainer: TrainerConfig) -> None:
    """Raises `ValueError` unless a run can be one whose bits no number of devices changes."""
    axis, num_shards = elastic_axis(trainer), trainer.elastic_shards
    ways = trainer.mesh[axis]
    others = {name: n for name, n in trainer.mesh.items() if name != axis and n > 1}
    if others:
        raise ValueError(
            f"trainer.reproducibility: the mesh has {others} besides `{axis}`; elastic bits hold "
            f"for data parallelism alone. Take a mesh like {{{axis}: {ways}}}."
        )
    if num_shards & (num_shards - 1) or num_shards % ways:
        raise ValueError(
            f"trainer.elastic_shards: {num_shards} must be a power of two and a multiple of the "
            f"{ways} devices along `{axis}`."
        )
    uneven = [size for size in trainer.batches.sizes if size % num_shards]
    if uneven or trainer.num_microbatches != 1:
        raise ValueError(
            f"trainer.elastic_shards: {num_shards} logical shards must divide "
            f"trainer.train_batch_size {', '.join(map(str, trainer.batches.sizes))}, and take the "
            f"place of trainer.num_microbatches, which is {trainer.num_microbatches} and must be "
            f"1: a device accumulates over its shards, so take more of them to save memory."
        )


def elastic_axis(trainer: TrainerConfig) -> str:
    """Returns the one mesh axis that an elastic run splits its batches over."""
    axes = mesh_axes(trainer.axis_resources.get("batch"))
    if len(axes) != 1:
        raise ValueError(
            f"trainer.reproducibility: elastic needs trainer.axis_resources to map `batch` to one "
            f"mesh axis, found {list(axes)}."
        )
    return axes[0]


def estimate_rows(config: AbstractSophiaConfig, batch_size: int) -> int:
    """Returns how many rows of a batch an estimate takes: every so many-th."""
    rows = config.estimate_rows
    wanted = rows if isinstance(rows, int) else max(round(rows * batch_size), 1)
    if wanted > batch_size or batch_size % wanted:
        raise ValueError(
            f"optimizer.estimate_rows: {rows} makes {wanted} rows, which do not divide the "
            f"{batch_size} of trainer.train_batch_size; take a divisor of it, or a share such as "
            f"0.5."
        )
    return wanted


def estimate_microbatches(rows: int, largest: int, ways: int) -> int:
    """Returns into how few pieces of at most `largest` rows, shared by `ways` devices, rows go."""
    for number in range(1, rows + 1):
        if rows % number == 0 and rows // number <= largest and rows // number % ways == 0:
            return number
    raise ValueError(
        f"optimizer.estimate_rows: {rows} rows cannot be cut into pieces of at most {largest} rows "
        f"(trainer.num_microbatches) that {ways} devices share evenly; take a multiple of {ways}."
    )


def elastic_estimate_rows(config: AbstractSophiaConfig, batch_size: int, num_shards: int) -> int:
    """Returns how many rows of a batch an estimate takes that logical shards share."""
    num_rows = estimate_rows(config, batch_size)
    if num_rows % num_shards:
        raise ValueError(
            f"optimizer.estimate_rows: {config.estimate_rows} makes {num_rows} of the "
            f"{batch_size} rows of a batch, which the {num_shards} logical shards of an elastic "
            f"run (trainer.elastic_shards) cannot share evenly; take a multiple of them."
        )
    return num_rows


def mesh_axes(physical: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a mapping."""
    if physical is None:
        return ()
    return (physical,) if isinstance(physical, str) else tuple(physical)


def entries(trainer: TrainerConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields field, logical axis and mesh axes of every entry of both mappings."""
    for field in MAPPINGS:
        for logical, physical in getattr(trainer, field).items():
            yield field, logical, mesh_axes(physical)


def hint(name: str, known: Collection[str]) -> str:
    """Returns what was probably meant by an unknown name, in brackets, if anything was."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _require_layout(trainer: TrainerConfig, optimizer: OptimizerConfig) -> None:
    require_layout(trainer)
    is_elastic = trainer.reproducibility == "elastic"
    if is_elastic:
        require_elastic(trainer)
    if not isinstance(optimizer, AbstractSophiaConfig):
        return
    for size in trainer.batches.sizes:
        if is_elastic:
            elastic_estimate_rows(optimizer, size, trainer.elastic_shards)
        else:
            rows, largest = estimate_rows(optimizer, size), size // trainer.num_microbatches
            estimate_microbatches(rows, largest, _ways(trainer))


def _require_stages_begin(trainer: TrainerConfig) -> None:
    """Refuses stages after the last update: somebody has written them in vain."""
    stages: dict[str, Sequence[BatchStage | LengthStage]] = {
        "sequence_length_schedule": trainer.sequence_length_schedule or ()
    }
    if not isinstance(trainer.train_batch_size, int):
        stages["train_batch_size"] = trainer.train_batch_size
    for field, of_field in stages.items():
        for number, stage in enumerate(of_field):
            if stage.start_step >= trainer.num_train_steps:
                raise ValueError(
                    f"trainer.{field}.{number}.start_step: {stage.start_step}, but the run ends "
                    f"with update {trainer.num_train_steps} (trainer.num_train_steps), so that "
                    f"this stage never begins. Let it begin earlier, or leave it out."
                )


def _require_shared_batch(batch: int, trainer: TrainerConfig) -> None:
    pieces = trainer.num_microbatches
    if batch % pieces:
        raise ValueError(
            f"trainer.num_microbatches: {pieces} does not divide trainer.train_batch_size {batch}."
        )
    ways = _ways(trainer)
    if (batch // pieces) % ways:
        axes = mesh_axes(trainer.axis_resources.get("batch"))
        raise ValueError(
            f"trainer.train_batch_size: {batch} rows in {pieces} microbatches are "
            f"{batch // pieces} rows at a time, which {ways} devices along mesh axis "
            f"`{' x '.join(axes)}` cannot share evenly; take a multiple of {pieces * ways}."
        )


def _ways(trainer: TrainerConfig) -> int:
    """Returns over how many devices the rows of a batch are split."""
    axes = mesh_axes(trainer.axis_resources.get("batch"))
    return math.prod(trainer.mesh[axis] for axis in axes)
