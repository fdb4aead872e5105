"""The progress of every long job, on stderr: a bar with time left in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class JobProgress:
    """Shows how far one job is.

    Args:
        description: what is being done.
        total: steps of the whole job.
        done: steps done before (a resumed job).
    """

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.first = description, total, done
        self.started = self.said = time.monotonic()
        self.printed = -1
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(description, total=total, completed=done)
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are finished; `note` stands beside the description."""
        text = f"{self.description}  {note}" if note else self.description
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=text)
            return
        now = time.monotonic()
        if done == self.printed or (done < self.total and now - self.said < SECONDS_BETWEEN_LINES):
            return
        self.said, self.printed = now, done
        left = (now - self.started) / max(done - self.first, 1) * (self.total - done)
        print(f"{text}  {done}/{self.total}  {_clock(now - self.started)}, left {_clock(left)}", file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
