"""Progress on stderr: a live bar on a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FIRST_LINE = 2.0
"""Seconds before the first plain line: shorter work prints none."""
EVERY = 10.0
"""Seconds between plain lines."""


def clock(seconds: float) -> str:
    """65 -> "1:05", 3725 -> "1:02:05"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bar:
    """Shows label, share, count, rate and time left while used as a context manager."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE
        console = Console(stderr=True)
        self._live = (
            Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        self._task = self._live.add_task(label, total=total, state=self._state()) if self._live else None

    def __enter__(self) -> "Bar":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def advance(self, rows: int) -> None:
        """`rows` more are done."""
        self._done += rows
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self._done, state=self._state())
        elif self._done < self._total and time.monotonic() >= self._next_line:
            say(f"{self._label} {self._state()}")
            self._next_line = time.monotonic() + EVERY

    def _state(self) -> str:
        share = f"{100 * self._done // max(self._total, 1)} %  {self._done:,}/{self._total:,}"
        if not self._done:
            return share
        rate = self._done / max(self.seconds, 1e-9)
        return f"{share}  {rate:,.1f} rows/s  {clock((self._total - self._done) / rate)} left"


def say(line: str) -> None:
    """One plain line on stderr."""
    print(line, file=sys.stderr, flush=True)
