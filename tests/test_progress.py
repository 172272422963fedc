"""Progress in a log file and on a terminal."""

import io
import re
import sys

import pytest
import tqdm.std as tqdm_module

from lowrank_tokens import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which the tests let pass."""
    now = [0.0]
    monkeypatch.setattr(progress.LogLines, "monitor_interval", 0)  # no thread
    monkeypatch.setattr(tqdm_module, "time", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_30_seconds_with_rate_and_time_left(clock, capsys):
    for _ in progress.over(range(8), "encode", "images"):
        clock[0] += 10
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert err.splitlines() == [
        "encode: 3 of 8,  0.10 images/s, 00:50 left",
        "encode: 6 of 8,  0.10 images/s, 00:20 left",
    ]


def test_a_short_loop_writes_nothing_into_a_log_file(clock, capsys):
    for _ in progress.over(range(100), "short", "images"):
        clock[0] += 0.2
    assert capsys.readouterr() == ("", "")


def test_what_an_earlier_run_has_done_counts_for_the_total_and_not_for_the_speed(clock, capsys):
    with progress.bar(100, "import", initial=90) as bar:
        clock[0] += 30
        bar.update(3)
    assert capsys.readouterr().err == "import: 93 of 100,  0.10 images/s, 01:10 left\n"


def test_a_terminal_gets_a_bar_on_stderr_that_is_taken_away_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.over(range(3), "ranks", "ranks"):
        assert re.search(r"ranks: +\d+%\|.*/3 \[.* left\]", sys.stderr.getvalue())
    assert sys.stderr.getvalue().endswith("\r") and capsys.readouterr().out == ""


def test_one_that_is_not_shown_writes_nothing_anywhere(clock, monkeypatch, capsys):
    for _ in progress.over("abc", "silent", "images", show=False):
        clock[0] += 100
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress.over("abc", "silent", "images", show=False))
    assert sys.stderr.getvalue() == "" and capsys.readouterr() == ("", "")
