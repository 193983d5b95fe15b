"""Runs the stages that need JAX in a process of their own, which cannot outlive its run.

Why a process: XLA reads its flags and thread counts once, before its first backend starts, and they
decide the bits of a result; a crash or an out-of-memory kill of training must not take the
orchestrator's worker with it; and an accelerator's memory is given back only by a process's end.

    parent (this module)                        child (`python -m resources.worker JOB.json`)
    JOB.json: entry, arguments, workspace  -->  imports and calls the entry
    reads messages while it waits          <--  Dagster Pipes messages; stdout and stderr
    RESULT.json, once the child has exited <--  written beside its name, renamed last

The child has its own session, so that a signal reaches all that it started. It is ended by TERM,
and by KILL after `grace_s`; when the parent dies, even by `kill -9`, the kernel sends the TERM and
the child's own watchdog the KILL. An interrupt passes through here as the `BaseException` that it
is, so Dagster's *Terminate* cannot become a retry. Only a crash (death by another signal than TERM,
INT or HUP) asks for one: the retry resumes from what the child had committed to its workspace.

A job of several processes (`trainer.processes`) starts that many children, each with a session of
its own, that find each other at an address on the loopback. Only the first one has the messages and
the result; what the others print is shown with their number. When one dies, the rest would wait for
it for ever, so they are killed; the run resumes from its last checkpoint as after any crash.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import dagster as dg
from pydantic import Field, PrivateAttr

from modeling import numerics
from modeling.artifacts import Built, Workspace
from modeling.experiment import ExperimentConfig
from resources.abandoned import LAUNCHED, process_tags, watching
from resources.secrets import scrub

_log = logging.getLogger(__name__)
PLATFORMS = ("cpu", "gpu", "tpu")
_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_LINES = 25
_FALLING_S = 2.0
"""Within which those that a dead process takes with it come to their end."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One call in a process of its own."""

    entry: str
    """`module:function`; called with the arguments, the workspace and a channel for messages."""
    arguments: Mapping[str, Any]
    """JSON values."""
    environment: Mapping[str, str]
    """Variables set before Python starts."""
    workspace: Workspace | None = None
    processes: int = 1
    """That share one mesh."""
    num_devices: int = 1
    """Of the mesh, virtual ones too."""
    devices_per_process: int | None = None
    """Accelerators of this host that each takes; None where `environment` makes its own."""


class LauncherResource(dg.ConfigurableResource):
    """Local processes."""

    platform: str | None = Field(
        default=None,
        description="cpu, gpu or tpu; else LEVANTER_PLATFORM, the first of JAX_PLATFORMS, cpu.",
    )
    grace_s: float = Field(
        default=60.0, description="Seconds from TERM to KILL: time to save a checkpoint.", gt=0
    )
    max_retries: int = Field(
        default=2, description="Times a crashed child is started again, resuming.", ge=0
    )
    _tell_of: Callable[[list[int]], None] | None = PrivateAttr(default=None)

    @contextlib.contextmanager
    def yield_for_execution(
        self, context: dg.InitResourceContext
    ) -> Generator["LauncherResource", None, None]:
        """Has the run tell of its processes, and look after those of others, while it lasts."""
        instance, run = context.instance, context.run
        if instance is None or run is None:
            yield self
            return

        def tell_of(pids: list[int]) -> None:
            instance.add_run_tags(run.run_id, process_tags(run.run_id, LAUNCHED, pids))

        self._tell_of = tell_of
        with watching(instance, run.run_id):
            yield self

    def platform_name(self) -> str:
        """Returns the kind of device that jobs run on."""
        first = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
        name = self.platform or os.environ.get("LEVANTER_PLATFORM") or first or "cpu"
        name = {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
        if name not in PLATFORMS:
            raise ValueError(f"platform: {name!r} is not one of {list(PLATFORMS)}.")
        return name

    def numerics(self, experiment: ExperimentConfig) -> dict[str, Any]:
        """Returns the numerics class of what `experiment` computes here."""
        name = self.platform_name()
        # The CPU is read from the operating system; only JAX knows how it calls an accelerator.
        device_kind = None if name == "cpu" else _device_kind(name)
        return numerics.numerics_class(
            experiment.trainer,
            platform=name,
            device_kind=device_kind,
            execution=experiment.model.execution,
        )

    def job(
        self,
        entry: str,
        name: str,
        experiment: ExperimentConfig,
        workspace: Workspace | None = None,
        **arguments: Any,
    ) -> Job:
        """Returns a call of `resources.stages:<entry>` for an experiment.

        Args:
            entry: a function of `resources.stages`.
            name: of the experiment.
            experiment: all of it, resolved.
            workspace: where it builds, if it builds.
            arguments: further JSON values; paths are passed as texts.
        """
        trainer, platform = experiment.trainer, self.platform_name()
        # Evaluation and export are for one process, whatever trained the model.
        trainer = trainer if entry == "train" else dataclasses.replace(trainer, processes=1)
        num_devices = math.prod(trainer.mesh.values()) // trainer.processes
        return Job(
            f"resources.stages:{entry}",
            {"name": name, "experiment": dataclasses.asdict(experiment)}
            | {key: str(v) if isinstance(v, Path) else v for key, v in arguments.items()},
            numerics.environment(trainer, platform),
            workspace,
            processes=trainer.processes,
            num_devices=math.prod(trainer.mesh.values()),
            devices_per_process=None if platform == "cpu" else num_devices,
        )

    def build(self, context: dg.AssetExecutionContext, job: Job) -> Built:
        """Runs a job that fills its workspace, and returns what it has built."""
        began = time.monotonic()
        result = self.run(context, job)
        held = round((time.monotonic() - began) * job.num_devices, 3)
        # Training accounts for itself: it alone knows of launches before this one.
        return Built(**result | {"facts": {"device_s": held} | result["facts"]})

    def run(
        self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, job: Job
    ) -> dict[str, Any]:
        """Runs `job` to its end and returns its result.

        Raises:
            dg.RetryRequested: the child crashed.
            dg.Failure: the child failed or was asked to stop; names its exit code and last lines.
        """
        with _messages_to(context) as variables:
            return self._call(job, variables)

    def start(self, job: Job, hear: Callable[[str], None]) -> "Running":
        """Runs `job` beside what this process does itself; `hear` is told each line it prints."""
        return Running(self, job, hear)

    def _call(
        self,
        job: Job,
        variables: Mapping[str, str],
        *,
        hear: Callable[[str], None] = lambda line: None,
        begun: "Callable[[list[_Child]], None]" = lambda children: None,
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="levanter-job-") as directory:
            result_path = Path(directory) / "RESULT.json"
            # A crash in native code tells where Python stood.
            environment = {"PYTHONFAULTHANDLER": "1", **job.environment, **variables}
            if overruled := numerics.overruled(os.environ, environment):
                _log.warning(
                    "not passed on to %s, since they could change its bits: %s. What a run is "
                    "computed with is set by its experiment (`trainer`).",
                    job.entry, ", ".join(overruled),
                )  # fmt: skip
            environment = {**numerics.inherited(os.environ), **environment}
            address = f"127.0.0.1:{_free_port()}"
            commands = []
            for index in range(job.processes):
                job_path = Path(directory) / f"JOB-{index}.json"
                job_path.write_text(json.dumps(self._job_file(job, result_path, index, address)))
                commands.append([sys.executable, "-m", "resources.worker", str(job_path)])
            code, last_lines = self._run_children(commands, environment, hear, begun)
            if code == 0 and result_path.exists():
                return json.loads(result_path.read_text())
            raise self._failure(job, code, last_lines)

    def _job_file(self, job: Job, result_path: Path, index: int, address: str) -> dict[str, Any]:
        workspace = job.workspace and {
            "progress": str(job.workspace.progress),
            "output": str(job.workspace.output),
            "remote": job.workspace.remote,
            "elsewhere": [[str(one.local), one.remote] for one in job.workspace.elsewhere],
        }
        seat = {
            "index": index,
            "count": job.processes,
            "address": address,
            "devices": job.devices_per_process,
        }
        return {
            "entry": job.entry,
            "arguments": dict(job.arguments),
            "workspace": workspace,
            "result": str(result_path),
            "parent": os.getpid(),
            "grace_s": self.grace_s,
            "seat": seat if job.processes > 1 else None,
        }

    def _run_children(
        self,
        commands: list[list[str]],
        environment: dict[str, str],
        hear: Callable[[str], None],
        begun: "Callable[[list[_Child]], None]",
    ) -> tuple[int, list[str]]:
        """Returns the exit code and last lines of the child that failed first, or of the first."""
        ended: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        children: list[_Child] = []
        try:
            for index, command in enumerate(commands):
                children.append(_Child(command, environment, index, ended, hear))
            if self._tell_of is not None:
                self._tell_of([child.pid for child in children])
            begun(children)
            told = self._wait(len(children), ended) or children[0]
            if told.code:
                for child in children:
                    child.signal(signal.SIGKILL)
        except BaseException:
            self.stop(children)
            raise
        finally:
            for child in children:
                child.drain()
        return told.code, list(told.last_lines)

    def _wait(self, number: int, ended: "queue.SimpleQueue[_Child]") -> "_Child | None":
        """Returns the child to blame soon after one has failed, or None once all have ended well.

        One that was asked to end has time to save together with the others. One that dies takes
        others down with it, so who died by a signal is looked for before an error is believed.
        """
        from modeling.training.preemption import EXIT_CODE

        worst: _Child | None = None
        for _ in range(number):
            is_stopping = worst is not None and worst.code == EXIT_CODE
            patience_s = self.grace_s if is_stopping else _FALLING_S
            try:
                child = ended.get(timeout=patience_s if worst else None)
            except queue.Empty:
                break
            if child.code < 0:
                return child
            if child.code and (worst is None or is_stopping):
                worst = child
        return worst

    def stop(self, children: "list[_Child]") -> None:
        """Ends the children and all they started, whatever else interrupts this."""
        try:
            for child in children:
                child.signal(signal.SIGTERM)
            deadline = time.monotonic() + self.grace_s
            for child in children:
                child.join(max(deadline - time.monotonic(), 0))
        finally:
            for child in children:
                child.signal(signal.SIGKILL)
            for child in children:
                child.join(None)

    def _failure(self, job: Job, code: int, last_lines: list[str]) -> Exception:
        from modeling.training.preemption import EXIT_AT_ONCE, EXIT_CODE

        output = "\n".join(last_lines) or "(it printed nothing)"
        metadata = {
            "exit_code": dg.MetadataValue.int(code),
            "last_lines": dg.MetadataValue.md(f"```\n{output}\n```"),
        }
        if code in (EXIT_CODE, EXIT_AT_ONCE) or -code in _ASKED_TO_STOP:
            return dg.Failure(
                f"{job.entry} was asked to stop (exit code {code}). What it had committed is kept: "
                f"materialize again to resume.\n{output}",
                metadata=metadata,
                allow_retries=False,
            )
        if code < 0:
            name = signal.Signals(-code).name
            crash = dg.Failure(
                f"{job.entry} crashed with {name} (exit code {code}).\n{output}", metadata=metadata
            )
            if self.max_retries == 0:
                return crash
            retry = dg.RetryRequested(max_retries=self.max_retries)
            retry.__cause__ = crash
            return retry
        what = f"failed with exit code {code}" if code else "exited with code 0 without a result"
        return dg.Failure(
            f"{job.entry} {what}. Its last lines:\n{output}",
            metadata=metadata,
            allow_retries=False,
        )


class Running:
    """A job in a process of its own, while this process does something else."""

    def __init__(self, launcher: LauncherResource, job: Job, hear: Callable[[str], None]) -> None:
        """See `LauncherResource.start`."""
        self._launcher = launcher
        self._children: list[_Child] = []
        self._begun = threading.Event()
        self._result: dict[str, Any] | None = None
        self._error: Exception | None = None
        # The child's death signal is tied to this very thread, which lives as long as it does.
        self._thread = threading.Thread(target=self._run, args=(job, hear), daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def wait(self) -> dict[str, Any]:
        """Returns the job's result when it has ended; raises what `LauncherResource.run` does."""
        while self._thread.is_alive():
            self._thread.join(0.2)  # so that an interrupt is heard
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def stop(self) -> None:
        """Asks it to end, and sees to it that it does."""
        self._begun.wait()
        if self._children and self.is_alive:
            self._launcher.stop(self._children)
        self._thread.join()

    def _run(self, job: Job, hear: Callable[[str], None]) -> None:
        def begun(children: list[_Child]) -> None:
            self._children = children
            self._begun.set()

        try:
            self._result = self._launcher._call(job, {}, hear=hear, begun=begun)
        except Exception as error:  # noqa: BLE001 (`wait` raises it again)
            self._error = error
        finally:
            self._begun.set()


@contextlib.contextmanager
def _messages_to(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
) -> Iterator[dict[str, str]]:
    """Opens a Pipes session for live messages; yields the variables by which the child finds it."""
    if isinstance(context, dg.AssetCheckExecutionContext):
        yield {}
        return
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # Dagster calls its own deprecated and preview interfaces while it opens a session.
            warnings.simplefilter("ignore", dg.PreviewWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            session = stack.enter_context(
                dg.open_pipes_session(
                    context=context,
                    context_injector=dg.PipesTempFileContextInjector(),
                    message_reader=dg.PipesTempFileMessageReader(),
                )
            )
        yield dict(session.get_bootstrap_env_vars())


class _Child:
    """One process of a job, its output, and its end."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        index: int,
        ended: "queue.SimpleQueue[_Child]",
        hear: Callable[[str], None],
    ) -> None:
        self.last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self.code = 0
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        mark = f"[process {index}] ".encode() if index else b""
        self._pump = threading.Thread(
            target=_pump, args=(self._process.stdout, mark, self.last_lines, hear), daemon=True
        )
        self._waiter = threading.Thread(target=self._await_end, args=(ended,), daemon=True)
        self._pump.start()
        self._waiter.start()

    @property
    def pid(self) -> int:
        """Its number, which is its process group's too."""
        return self._process.pid

    def _await_end(self, ended: "queue.SimpleQueue[_Child]") -> None:
        self.code = self._process.wait()
        ended.put(self)

    def join(self, timeout_s: float | None) -> None:
        """Waits for its end, for so long."""
        self._waiter.join(timeout_s)

    def drain(self) -> None:
        """Waits for its last lines."""
        # Something that the child started may hold the pipe open; its output is not waited for.
        self._pump.join(timeout=5)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _pump(
    stream: IO[bytes], mark: bytes, tail: collections.deque[str], hear: Callable[[str], None]
) -> None:
    """Copies the child's output, without secrets, to where terminal and compute log see it."""
    with stream:
        for line in stream:
            text = scrub(line.decode(errors="replace"))
            tail.append(text.rstrip("\n"))
            hear(tail[-1])
            view = memoryview(mark + text.encode())
            while view:
                view = view[os.write(1, view) :]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _device_kind(platform: str) -> str:
    backend = {"gpu": "cuda"}.get(platform, platform)
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"],
        env={**os.environ, "JAX_PLATFORMS": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"platform {platform!r}: JAX finds no such device.\n{done.stderr.strip()[-2000:]}"
        )
    return done.stdout.strip().splitlines()[-1]
