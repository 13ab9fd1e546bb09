"""Progress in units a reader can use, on a clock that the test sets."""

from types import SimpleNamespace

import pytest

from sae.progress import Progress, duration, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock at `now`, and a stderr that is not a terminal."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("sae.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("done", "seconds", "rate"),
    [
        (12_000, 4, "3,000 tokens/s"),
        (40, 8, "5.0 tokens/s"),
        (11, 10, "1.1 tokens/s"),
        (1, 2, "2.0 s each"),
        (3, 128, "43 s each"),
        (2, 5000, "2,500 s each"),
    ],
)
def test_a_slow_step_says_seconds_each_and_a_fast_one_units_a_second(clock, done, seconds, rate):
    bar = Progress("harvest", 10**6, "tokens")
    clock.now += seconds
    bar.advance(done)
    assert bar.line() == f"{done:,} of 1,000,000 tokens, {rate}"


def test_a_resumed_run_counts_what_it_did_itself(clock):
    bar = Progress("training", 100, "steps", done=90)
    assert bar.line() == "90 of 100 steps"
    clock.now += 20
    bar.advance(5, loss="0.3")
    assert bar.line() == "95 of 100 steps, 4.0 s each, loss 0.3"


def test_a_log_gets_a_line_in_ten_seconds_with_the_time_left_and_one_at_the_end(clock, capsys):
    with progress("mapping", 40, "directions") as bar:
        for _ in range(40):
            clock.now += 3
            bar.advance(1)
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 9  # every fourth advance but the last, which ends the work
    assert lines[0] == "mapping: 4 of 40 directions, 3.0 s each, about 1 min 48 s left"
    assert last == "mapping: 40 of 40 directions, 3.0 s each"


def test_nothing_done_is_no_rate(clock, capsys):
    with progress("ask", 5, "features"):
        clock.now += 30
    assert capsys.readouterr().err == "ask: 0 of 5 features\n"


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 3600, 7500, 360_000)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min", "100 h 0 min",
    ]  # fmt: skip
