"""How far a run is, on the standard error: a bar in a terminal, lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# Seconds between two lines where there is no terminal: a log stays readable.
LINE_EVERY = 5.0


class Progress:
    """Shows steps done of a total, with the time that the rest will take at the same pace.

    quiet: nothing but notes of things that may be wrong. stream: where it goes (stderr).
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._began = self._said = 0.0
        self._first = self._last = self._total = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """A line that stays: what is being done now."""
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """A line that stays and is shown even when quiet: what the reader should know."""
        self._line(f"note: {text}")

    def step(self, done: int, total: int, what: str) -> None:
        """`done` of `total` equal steps are finished; `what` names the one that was last."""
        if self.quiet:
            return
        now = time.monotonic()
        if not self._began or done < self._last or total != self._total:  # something new begins
            self._began, self._first, self._said = now, done, 0.0
            if self._bar is not None and self._task is not None:
                self._bar.reset(self._task, total=total, completed=done, description=what)
        self._last, self._total = done, total
        if self.stream.isatty():
            self._draw(done, total, what)
            return
        if now - self._said >= LINE_EVERY or done == total:
            self._said = now
            self._line(f"{done}/{total}  {what}{self._left(now, done, total)}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def _left(self, now: float, done: int, total: int) -> str:
        """The pace counts from the first step seen here: a resumed run did not do the others."""
        mine = done - self._first
        if mine < 1 or done == total:
            return ""
        return f"  {clock((now - self._began) / mine * (total - done))} left"

    def _draw(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar
            from rich.table import Column

            self._bar = Bar(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left", markup=False),
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=Console(file=self.stream),
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, completed=self._first)
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=what)


def clock(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 3:05, 1:02:09."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
