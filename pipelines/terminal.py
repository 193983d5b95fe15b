"""What a person at a terminal sees of a run: the plan, one moving line a stage, and the table.

Dagster's own console prints every event of every step. This one listens to the same events and
messages and shows where the run is: on a terminal in one line that changes, elsewhere in a line
every few seconds.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import dagster as dg
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modeling.artifacts import ArtifactStore
from pipelines.lineage import summary
from pipelines.staleness import Staleness

if TYPE_CHECKING:
    from pipelines.run import Row

_QUIET_INTERVAL_S = 5.0
_STATE_STYLES = {
    "built": "green",
    "reused": "cyan",
    "fresh": "dim",
    "failed": "bold red",
    "missing": "yellow",
    "stale": "yellow",
    "upstream": "yellow",
}


class Terminal:
    """Prints a run's plan, progress and outcome to one stream."""

    def __init__(self, stream: TextIO) -> None:
        """Prints to `stream`, in place if it is a terminal."""
        width = None if stream.isatty() else 120
        self._console = Console(file=stream, width=width, highlight=False, soft_wrap=False)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._started: dict[str, float] = {}
        self._last_told = 0.0
        self._names: set[str] = set()
        self.seconds: dict[str, float] = {}
        """Time of each asset that this run has finished, by name."""

    def plan(
        self,
        experiment: str,
        wanted: Sequence[dg.AssetKey],
        stale: Mapping[dg.AssetKey, Staleness],
    ) -> None:
        """Says what will be made, and why."""
        self._names = {key.to_user_string() for key in wanted}
        if not stale:
            self._print(
                f"[bold]{experiment}[/]: all {len(wanted)} assets are fresh; nothing to do."
            )
            return
        self._print(f"[bold]{experiment}[/]: {len(stale)} of {len(wanted)} assets to make.")
        for key, why in stale.items():
            causes = "; ".join(why.causes) or "never made"
            self._print(
                f"  [yellow]{why.status.lower():8}[/] {key.to_user_string()}  "
                f"[dim]{escape(causes)}[/]"
            )

    def say(self, line: str) -> None:
        """Prints one line as it is."""
        self._print(escape(line), soft_wrap=True)

    def show_events(self) -> None:
        """Begins to show what `terminal_logger` hears."""
        _Listener.terminal = self
        if self._status is not None:
            self._status.start()

    def stage_started(self, asset: str) -> None:
        """Begins a stage; the steps of checks go by other names and show their verdict only."""
        if asset in self._names:
            self._started[asset] = time.monotonic()
            self._tell(asset, "started")

    def progress(self, asset: str, message: str) -> None:
        """Shows how a stage is getting on; now and then where lines cannot be overwritten."""
        if asset not in self._names:
            return
        now = time.monotonic()
        if self._status is not None or now - self._last_told >= _QUIET_INTERVAL_S:
            self._last_told = now
            self._tell(asset, message)

    def stage_made(self, asset: str, state: str, content_id: str) -> None:
        """Ends a stage that has succeeded."""
        self.seconds[asset] = time.monotonic() - self._started.get(asset, time.monotonic())
        style = _STATE_STYLES[state]
        self._print(
            f"  [{style}]{state:8}[/] {asset}  [dim]{content_id[:12]}[/]  "
            f"{self.seconds[asset]:.1f} s"
        )

    def check(self, asset: str, name: str, passed: bool, description: str) -> None:
        """Shows a check's verdict."""
        if passed:
            self._print(f"           [green]✓[/] {name}")
        else:
            self._print(f"           [bold red]✗ {name}[/]: {escape(description)}")

    def stage_failed(self, asset: str, error: str) -> None:
        """Shows why a stage has failed."""
        self._print(f"  [bold red]failed[/]   {asset}: {escape(error)}")

    def failure(self, log: Path) -> None:
        """Says where the whole story is."""
        self._stop()
        self._print(
            f"[bold red]The run failed.[/] Everything that was printed is in {log}. What was "
            f"committed is kept: the same command resumes."
        )

    def table(
        self, experiment: str, rows: "Sequence[Row]", store: ArtifactStore, seconds: float
    ) -> None:
        """Shows every asset with its figures, where the model lies, and a sample of it."""
        self._stop()
        self._print("")
        self._console.print(_table(rows))
        self._results({row.key.path[-1]: row for row in rows}, store)
        self._print(f"[dim]{seconds:.1f} s in all.[/]")

    def status(self, rows: "Sequence[Row]", stale: Mapping[dg.AssetKey, Staleness]) -> None:
        """Shows every asset's state, and why it is not fresh."""
        self._console.print(_table(rows))
        for key, why in stale.items():
            causes = "; ".join(why.causes) or "never made"
            self._print(f"[yellow]{key.to_user_string()}[/]: {escape(causes)}")
        if not stale:
            self._print("Everything is fresh.")

    def _results(self, by_stage: "Mapping[str, Row]", store: ArtifactStore) -> None:
        export, report = by_stage.get("hf_model"), by_stage.get("eval_report")
        if export is not None and export.record is not None:
            where = store.local("hf_model", export.record["content_id"])
            self._print(f"[bold]Hugging Face model[/]  {where}", soft_wrap=True)
        if report is not None and report.record is not None:
            where = store.local("eval_report", report.record["content_id"]) / "report.html"
            self._print(f"[bold]Eval report[/]         {where}", soft_wrap=True)
            for sample in report.record["facts"]["samples"][:1]:
                text = escape(sample["prompt"] + sample["text"])
                self._print(f"[bold]Sample[/] (after {escape(repr(sample['prompt']))})")
                self._print("\n".join(f"  {line}" for line in text.splitlines()))

    def _tell(self, asset: str, message: str) -> None:
        if self._status is not None:
            self._status.update(f"{asset}  [dim]{escape(message)}[/]")
        else:
            self._print(f"           {asset}  {escape(message)}")

    def _print(self, text: str, **options: Any) -> None:
        self._console.print(text, **options)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
        _Listener.terminal = None


def _table(rows: "Sequence[Row]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("asset", "state", "content id"):
        table.add_column(name, no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("figures")
    for row in rows:
        figures = summary(row.record) if row.record else ""
        if row.parity is not None:
            figures += f", logits within {row.parity:.1e} of the checkpoint's"
        table.add_row(
            row.key.to_user_string(),
            f"[{_STATE_STYLES[row.state]}]{row.state}[/]",
            row.record["content_id"][:12] if row.record else "",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            figures,
        )
    return table


class _Listener(logging.Handler):
    """Turns a run's log records into calls of the terminal."""

    terminal: Terminal | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Passes on what the terminal shows; everything else is in the run's event log."""
        terminal = self.terminal
        meta: Mapping[str, Any] = getattr(record, "dagster_meta", {})
        if terminal is None:
            return
        event = meta.get("dagster_event")
        if event is None:
            if record.levelno < logging.INFO:
                return
            message = str(meta.get("orig_message", record.getMessage()))
            if (asset := _asset_of(meta.get("step_key"))) and not message.startswith("[pipes]"):
                terminal.progress(asset, message)
            return
        if event.event_type_value == "STEP_START" and (asset := _asset_of(event.step_key)):
            terminal.stage_started(asset)
        elif event.event_type_value == "ASSET_MATERIALIZATION":
            made = event.event_specific_data.materialization
            shown = made.metadata
            terminal.stage_made(
                made.asset_key.to_user_string(), shown["was"].value, shown["content_id"].value
            )
        elif event.event_type_value == "ASSET_CHECK_EVALUATION":
            verdict = event.event_specific_data
            name = verdict.asset_key.to_user_string()
            terminal.check(name, verdict.check_name, verdict.passed, verdict.description or "")
        elif event.event_type_value == "STEP_FAILURE":
            error = event.event_specific_data.error
            cause = error.cause or error
            terminal.stage_failed(event.step_key.replace("__", "/"), cause.message.strip())


def _asset_of(step_key: str | None) -> str | None:
    return step_key and step_key.replace("__", "/")


def _make_logger(context: dg.InitLoggerContext) -> logging.Logger:
    # Dagster logs most of a run's events at this level.
    logger = logging.Logger("levanter", logging.DEBUG)
    logger.addHandler(_Listener())
    return logger


terminal_logger = dg.LoggerDefinition(
    _make_logger, config_schema={}, description="Shows a run to a person at a terminal."
)
"""The logger behind `levanter run`."""
