"""Progress where there is no terminal: few lines, a time that follows from the pace."""

import io

import pytest

from headwise.cli import progress
from headwise.cli.progress import Progress, clock


class Clock:
    """A clock that only moves when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_seldom_and_say_what_is_left(time: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        for done in range(1, 11):
            shown.step(done, 10, f"layer {done}")
            time.now += 2
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == ["1/10", "layer", "1"]
    # Three steps of two seconds later: six are left.
    assert lines[1] == "4/10  layer 4  12 s left"
    assert lines[-1] == "10/10  layer 10"
    assert len(lines) == 4


def test_the_pace_of_a_resumed_run_is_its_own(time: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        shown.step(900, 1000, "layer 9")
        time.now += 10
        shown.step(901, 1000, "layer 9")
    assert stream.getvalue().splitlines()[1] == "901/1000  layer 9  16:30 left"


def test_what_begins_anew_has_a_pace_of_its_own(time: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        for first, total in ((1, 10), (1, 20)):
            for done in range(first, total + 1):
                shown.step(done, total, "windows")
                time.now += total
    lines = stream.getvalue().splitlines()
    assert "2/10  windows  1:20 left" in lines
    assert "2/20  windows  6:00 left" in lines


def test_quiet_says_only_what_may_be_wrong() -> None:
    stream = io.StringIO()
    with Progress(quiet=True, stream=stream) as shown:
        shown.note("loading")
        shown.step(1, 2, "layer 1")
        shown.warn("longer than the model is made for")
    assert stream.getvalue() == "note: longer than the model is made for\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream=stream) as shown:
        shown.step(1, 4, "text 1 [layer 1]")
        shown.note("a line above the bar")
        shown.step(4, 4, "text 1 [layer 4]")
    assert "4/4" in stream.getvalue()
    assert "text 1 [layer 4]" in stream.getvalue()
    assert "a line above the bar" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (3729, "1:02:09")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said
