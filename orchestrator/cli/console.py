"""Output of the command line. The only module that prints.

Text from specs and data sets is never interpreted as markup. On a terminal the progress of a run is
a live display; otherwise it is one plain line every few seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.results.causes import cause_of
from workers.inputs import counted
from workers.types import EditSweepError

if TYPE_CHECKING:
    from orchestrator.engine.run_state import Safety
    from orchestrator.engine.worker import StepReport
    from orchestrator.planning.plan import Plan
    from orchestrator.planning.work import Shard

PLAIN_SECONDS = 5.0
"""Seconds between two plain progress lines."""

_CAUSES = 5
"""The live display shows at most so many causes of failures."""

_WIDTH = 160
"""Width in characters if the output is not a terminal."""

_UNLIMITED = 1_000_000


class OutputError(EditSweepError):
    """Standard output cannot be written to: it is a file on a full disk, for instance."""


class _Answers:
    """Standard output, whose errors are not taken for errors of the command."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: Any) -> Any:
        with self._told():
            return self._stream.write(data)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _told() -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Output:
    """The two output streams: results go to standard output; progress, notes and errors go to
    standard error.

    >>> out = Output()                                          # doctest: +SKIP
    >>> out.table("cells", ("method", "T"), [("rome", "10")])   # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.answers = _console(_Answers(sys.stdout))
        self.asides = _console(sys.stderr)

    def say(self, text: str = "") -> None:
        self.answers.print(plain(text), soft_wrap=True)

    def note(self, text: str) -> None:
        self.asides.print(plain(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.asides.print(Text.assemble(("warning: ", "yellow"), plain(text)), soft_wrap=True)

    def error(self, text: str) -> None:
        self.asides.print(Text.assemble(("error: ", "bold red"), plain(text)), soft_wrap=True)

    def table(
        self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
    ) -> None:
        """A table; ``right`` lists the columns aligned to the right. Where it does not fit without
        breaking words, each row is a block of lines, one line per column."""
        rows = list(rows)
        table = _table(title, header, rows, right)
        if self._needs(table, "minimum") <= self.answers.width or not rows:
            self.answers.print(table)
            return
        if title:
            self.say(title)
        wide = max(map(len, header))
        for number, row in enumerate(rows, 1):
            self.answers.rule(f"{number} of {len(rows)}", align="left", characters="-", style="")
            for name, cell in zip(header, row, strict=True):
                self.answers.print(plain(f"{name:{wide}}  {cell}"), soft_wrap=True)

    def fits(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """Return whether a table fits with no line of a cell broken."""
        return self._needs(_table("", header, rows, ()), "maximum") <= self.answers.width

    def _needs(self, table: Table, bound: Literal["minimum", "maximum"]) -> int:
        """The columns of the terminal that a table takes at least, or unbroken."""
        options = self.answers.options.update(width=_UNLIMITED)
        columns = [
            max(
                (getattr(Measurement.get(self.answers, options, cell), bound) for cell in column.cells),
                default=0,
            )
            for column in table.columns
        ]
        heads = [Measurement.get(self.answers, options, column.header).minimum for column in table.columns]
        gaps = 2 * len(columns)
        return sum(max(pair) for pair in zip(columns, heads, strict=True)) + gaps

    def raw(self) -> BinaryIO:
        """Standard output for bytes, neither wrapped nor coloured."""
        self.flush()
        return cast(BinaryIO, _Answers(sys.stdout.buffer))

    def flush(self) -> None:
        """Raises :class:`OutputError` if what was said cannot be written."""
        self.answers.file.flush()

    def view(self) -> RunView:
        return LiveView(self.asides) if self.asides.is_terminal else RunView(self.asides)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> Table:
    table = Table(
        title=plain(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, name in enumerate(header):
        table.add_column(plain(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    return table


def plain(text: str) -> Text:
    """Text without markup. Control characters are escaped, because text from a data set must not
    control the terminal."""
    return Text(
        "".join(c if (c >= " " and not "\x7f" <= c <= "\x9f") or c in "\n\t" else repr(c)[1:-1] for c in text)
    )


def _console(stream: Any) -> Console:
    width = None if stream.isatty() else _width_of_a_pipe()
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def _width_of_a_pipe() -> int:
    """The columns that ``COLUMNS`` asks for, where it is set."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isascii() and asked.isdecimal() and int(asked) else _WIDTH


@dataclass
class _RunningShard:
    """Progress of a shard that is running."""

    shard: Shard
    title: str
    tick: int = 0
    ticks: int = 0
    edits: int = 0
    seconds: float = 0.0
    attempt: int = 1


@dataclass
class RunView:
    """Progress in plain lines (an :class:`orchestrator.engine.run_state.View`), and the counters that
    both views share."""

    console: Console
    plan: Plan | None = None
    flights: dict[str, _RunningShard] = field(default_factory=dict)
    done_shards: int = 0
    failed_shards: int = 0
    failed_groups: int = 0
    causes: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Failed groups by cause: the first message, and how many groups."""
    edits: int = 0
    kept: int = 0
    batches: int = 0
    cost_done: float = 0.0
    cost_skipped: float = 0.0
    began: float = 0.0
    building: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    _last: float = 0.0
    _furthest: dict[str, int] = field(default_factory=dict)
    """Shard id -> the highest tick reported, so that steps of a restarted shard count once."""
    _shown_causes: dict[str, int] = field(default_factory=dict)

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        self.began = time.monotonic()
        self.note(begin_line(plan))

    def note(self, text: str) -> None:
        self.console.print(plain(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), plain(text)), soft_wrap=True)

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None:
        self.building[title] = (done, total, what)
        self.show()

    def artifact_ended(self, title: str) -> None:
        self.building.pop(title, None)

    def shard_started(self, shard: Shard, title: str) -> None:
        if not self.flights and not self.edits:
            self.began = time.monotonic()  # edits/s and ETA count from the first shard's start
        self.flights[shard.shard_id] = _RunningShard(shard, title)
        self.show()

    def shard_step(self, step: StepReport) -> None:
        flight = self.flights.get(step.shard_id)
        if flight is None:
            return
        before = self._furthest.get(step.shard_id, 0)
        self._furthest[step.shard_id] = max(before, step.tick)
        share = max(0, step.tick - before) / max(1, step.ticks) * flight.shard.cost
        if step.edits or step.seconds:
            self.cost_done += share
        else:
            self.cost_skipped += share  # committed by an earlier attempt
        flight.tick, flight.ticks, flight.attempt = step.tick, step.ticks, step.attempt
        flight.edits += step.edits
        flight.seconds += step.seconds
        self.edits += step.edits
        self.kept += step.kept
        self.batches += step.batches
        self.failed_groups += step.failures
        for message in step.causes:
            first, count = self.causes.get(cause_of(message), (message.splitlines()[0][:200], 0))
            self.causes[cause_of(message)] = (first, count + 1)
        self.show()

    def shard_ended(self, shard_id: str, ok: bool) -> None:
        self.flights.pop(shard_id, None)
        self.done_shards += ok
        self.failed_shards += not ok
        self.show()

    def end(self) -> None:
        self.show(force=True)
        self._note_cache_hits()

    def _note_cache_hits(self) -> None:
        if self.batches:
            share = percent(self.kept, self.batches)
            self.note(
                f"scoring: {share} of {self.batches} batches found the layers below their edit in the cache"
            )

    def show(self, force: bool = False) -> None:
        now = time.monotonic()
        if self.plan is None or not (force or now - self._last >= PLAIN_SECONDS):
            return
        self._last = now
        if self.building and not self.flights:
            parts = [
                f"{title} {percent(done, total)} ({what})"
                for title, (done, total, what) in self.building.items()
            ]
            self.console.print(
                plain(f"{time.strftime('%H:%M:%S')} building {', '.join(parts)}"), soft_wrap=True
            )
            return
        self.console.print(Text(f"{self.line()}{self._running()}"), soft_wrap=True)
        for cause, (_, count) in self.causes.items():
            if count != self._shown_causes.get(cause):
                self._shown_causes[cause] = count
                self.console.print(self._cause_line(cause), soft_wrap=True)

    def _cause_line(self, cause: str) -> Text:
        first, count = self.causes[cause]
        return plain(f"  failed: {count} x {first}")

    def _running(self) -> str:
        parts = [f"{f.title} {percent(f.tick, f.ticks)}" for f in list(self.flights.values())[:4]]
        more = len(self.flights) - len(parts)
        return f" | running: {', '.join(parts)}{f' and {more} more' if more else ''}" if parts else ""

    def line(self) -> str:
        """Shards, edits/s, ETA and failures in one line."""
        plan = self.plan
        assert plan is not None
        seconds = max(1e-9, time.monotonic() - self.began)
        total = sum(shard.cost for shard in plan.shards)
        left = total - self.cost_done - self.cost_skipped
        eta = duration(left * seconds / self.cost_done) if self.cost_done > 0 and left > 1e-6 * total else "-"
        failures = self.failed_shards + self.failed_groups
        return (
            f"{time.strftime('%H:%M:%S')} {self.done_shards}/{len(plan.shards)} shards, "
            f"{percent(self.cost_done + self.cost_skipped, total)}, {self.edits / seconds:.1f} edits/s, "
            f"ETA {eta}, {failures} failed"
        )


@dataclass
class LiveView(RunView):
    """Live progress display: one line per running shard."""

    _live: Live | None = None

    def begin(self, plan: Plan) -> None:
        super().begin(plan)
        self._live = Live(
            console=self.console, refresh_per_second=4, transient=True, get_renderable=self._render
        )
        self._live.start()

    def show(self, force: bool = False) -> None:
        """No-op: the live display refreshes itself."""

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        RunView.show(self, force=True)
        self._note_cache_hits()

    def _render(self) -> Group:
        if self.plan is None:
            return Group(Text(""))
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(4):
            table.add_column()
        for title, (done, total, what) in list(self.building.items())[:20]:
            table.add_row(plain(title), _bar(done, total), plain(what), Text(""))
        for flight in list(self.flights.values())[:20]:
            speed = f"{flight.edits / flight.seconds:.1f} edits/s" if flight.seconds else "starting"
            again = f"try {flight.attempt}" if flight.attempt > 1 else ""
            table.add_row(Text(flight.title), _bar(flight.tick, flight.ticks), Text(speed), Text(again))
        causes = [self._cause_line(cause) for cause in list(self.causes)[:_CAUSES]]
        return Group(table, Text(self.line()), *causes)


def _bar(done: int, total: int, width: int = 24) -> Text:
    filled = round(width * done / total) if total else 0
    return (
        Text("━" * filled, "green") + Text("━" * (width - filled), "dim") + Text(f" {percent(done, total)}")
    )


def begin_line(plan: Plan) -> str:
    """The opening line of `plan` and `run`: what is left, what is done, what failed."""
    cells = plan.asked
    groups = sum(cell.groups for cell in cells)
    done = sum(min(plan.done_groups[cell.cell_id], cell.groups) for cell in cells)
    failed = sum(plan.failed_groups.get(cell.cell_id, 0) for cell in cells)
    lost = (
        f"; {failed} groups failed before and are left alone (--retry-failed runs them again)"
        if failed
        else ""
    )
    if not plan.shards:
        if done == groups:
            return f"{counted(len(cells), 'cell')}: all done"
        return f"{counted(len(cells), 'cell')}, nothing to run: {done} of {groups} groups done{lost}"
    been = f", {done} of {groups} groups done before" if done else ""
    again = sum(shard.begun for shard in plan.shards)
    resumed = f" ({again} to be continued)" if again else ""
    return (
        f"{counted(len(cells), 'cell')}, {counted(len(plan.shards), 'shard')}{resumed}, "
        f"{counted(plan.edits_left, 'edit')} to make{been}{lost}"
    )


def safety_line(safety: Safety) -> str:
    """Time spent on writing the results durably, in one line."""
    return (
        f"safety: journal {safety.journal_seconds:.1f} s of {safety.actor_seconds:.0f} actor-seconds, "
        f"gather {safety.gather_seconds:.1f} s of {safety.wall_seconds:.0f} s: {100 * safety.share:.1f}%"
    )


def percent(done: float, total: float) -> str:
    return f"{100 * done / total:.0f}%" if total else "0%"


def duration(seconds: float) -> str:
    """Seconds with a readable unit, as in "12 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes with a readable unit, as in "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
