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
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import dagster as dg
from pydantic import Field

from modeling import numerics
from modeling.artifacts import Built, Workspace
from modeling.experiment import ExperimentConfig

PLATFORMS = ("cpu", "gpu", "tpu")
_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_LINES = 25


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
        return Job(
            f"resources.stages:{entry}",
            {"name": name, "experiment": dataclasses.asdict(experiment)}
            | {key: str(v) if isinstance(v, Path) else v for key, v in arguments.items()},
            numerics.environment(experiment.trainer, self.platform_name()),
            workspace,
        )

    def build(self, context: dg.AssetExecutionContext, job: Job) -> Built:
        """Runs a job that fills its workspace, and returns what it has built."""
        return Built(**self.run(context, job))

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
        begun: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="levanter-job-") as directory:
            result_path = Path(directory) / "RESULT.json"
            job_path = Path(directory) / "JOB.json"
            job_path.write_text(json.dumps(self._job_file(job, result_path)))
            command = [sys.executable, "-m", "resources.worker", str(job_path)]
            # A crash in native code tells where Python stood.
            environment = {"PYTHONFAULTHANDLER": "1", **job.environment, **variables}
            code, last_lines = self._run_child(
                command, {**numerics.inherited(os.environ), **environment}, hear, begun
            )
            if code == 0 and result_path.exists():
                return json.loads(result_path.read_text())
            raise self._failure(job, code, last_lines)

    def _job_file(self, job: Job, result_path: Path) -> dict[str, Any]:
        workspace = job.workspace and {
            "progress": str(job.workspace.progress),
            "output": str(job.workspace.output),
        }
        return {
            "entry": job.entry,
            "arguments": dict(job.arguments),
            "workspace": workspace,
            "result": str(result_path),
            "parent": os.getpid(),
            "grace_s": self.grace_s,
        }

    def _run_child(
        self,
        command: list[str],
        environment: dict[str, str],
        hear: Callable[[str], None],
        begun: Callable[[subprocess.Popen[bytes]], None],
    ) -> tuple[int, list[str]]:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert child.stdout is not None
        tail: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        pump = threading.Thread(target=_pump, args=(child.stdout, tail, hear), daemon=True)
        try:
            pump.start()
            begun(child)
            code = child.wait()
        except BaseException:
            self.stop(child)
            raise
        finally:
            # Something that the child started may hold the pipe open; its output is not waited for.
            pump.join(timeout=5)
        if code:
            _signal_group(child, signal.SIGKILL)
        return code, list(tail)

    def stop(self, child: subprocess.Popen[bytes]) -> None:
        """Ends the child and all it started, whatever else interrupts this."""
        try:
            _signal_group(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(self.grace_s)
        finally:
            _signal_group(child, signal.SIGKILL)
            child.wait()

    def _failure(self, job: Job, code: int, last_lines: list[str]) -> Exception:
        from modeling.training.preemption import EXIT_CODE

        output = "\n".join(last_lines) or "(it printed nothing)"
        metadata = {
            "exit_code": dg.MetadataValue.int(code),
            "last_lines": dg.MetadataValue.md(f"```\n{output}\n```"),
        }
        if code == EXIT_CODE or -code in _ASKED_TO_STOP:
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
        self._child: subprocess.Popen[bytes] | None = None
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
        if self._child is not None and self.is_alive:
            self._launcher.stop(self._child)
        self._thread.join()

    def _run(self, job: Job, hear: Callable[[str], None]) -> None:
        def begun(child: subprocess.Popen[bytes]) -> None:
            self._child = child
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


def _pump(stream: IO[bytes], tail: collections.deque[str], hear: Callable[[str], None]) -> None:
    """Copies the child's output to this process's own, where terminal and compute log see it."""
    with stream:
        for line in stream:
            tail.append(line.decode(errors="replace").rstrip("\n"))
            hear(tail[-1])
            view = memoryview(line)
            while view:
                view = view[os.write(1, view) :]


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


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
