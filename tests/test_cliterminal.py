"""What a terminal sees of the command line, and what a log file does."""

from __future__ import annotations

import io
import signal
import sys
import time
from contextlib import nullcontext

import pytest

from comfy_continual_lora import cli, cliprogress, cliterminal
from comfy_continual_lora.cliprogress import Bar
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that shows colours, from now on in place of stderr and stdout."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("WT_SESSION", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_mistakes_are_red_where_there_are_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    assert cli.main(["info", "-c", "missing"]) == 2
    assert terminal.getvalue().startswith("\x1b[31mcontinual-lora\x1b[0m: There is no checkpoint")
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert cliterminal.styled("x", "red", terminal) == "x"
    assert cliterminal.styled("x", "red", io.StringIO()) == "x"


def test_messages_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 100
    for columns, widest in (("40", 40), ("400", 110)):
        monkeypatch.setenv("COLUMNS", columns)
        longest = max(map(len, cliterminal.wrapped(text).splitlines()))
        assert widest - 5 < longest <= widest


def test_a_log_file_gets_a_line_at_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    try:
        for step in range(101):
            bar(Progress("learn", step, 100))
        bar(Progress("solve", 10, 10))  # another stage at the same tenth
    finally:
        bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in range(0, 101, 10)] + [
        "10/10"
    ]


def test_a_log_file_is_never_silent_for_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cliprogress, "SILENCE", 0.05)
    bar = Bar()
    try:
        bar(Progress("load", 0, 1))
        time.sleep(0.5)  # one long step
    finally:
        bar.close()
    time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 11
    assert all(line.split()[:2] == ["load", "0/1"] for line in lines)
    assert lines[-1].endswith("0:00")
    time.sleep(0.2)
    assert not capsys.readouterr().err  # the thread has ended


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal is closed by a signal")
def test_a_closed_terminal_stops_a_command_unless_that_is_ignored() -> None:
    for handler, is_heard in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(signal.SIGHUP, handler)
        bar = Bar()
        try:
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Cancelled) if is_heard else nullcontext():
                bar(Progress("learn", 3, 5))
            assert bar.stopped_by == (signal.SIGHUP if is_heard else 0)
        finally:
            bar.close()
            assert signal.signal(signal.SIGHUP, before) == handler


def test_a_terminal_keeps_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    bar = Bar()
    try:
        for step in range(5):
            bar(Progress("learn", step, 5, note="a note" if step == 3 else ""))
    finally:
        bar.close()
    assert terminal.getvalue().count("\n") == 1
    assert "\x1b[33mcontinual-lora\x1b[0m: a note\n" in terminal.getvalue()
