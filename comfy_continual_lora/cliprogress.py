"""Progress on a terminal, and the signals that stop a command. Light."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from .cliterminal import said
from .errors import Cancelled, spelled
from .progress import RESUMED, Progress

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes (`parallel`), only one prints
SILENCE = 30.0  # seconds after which a line is written where no terminal shows progress
# Of Ctrl-C, a service manager, a terminal that was closed and, on Windows, Ctrl-Break
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
STOPPING = tuple(one for one in signal.Signals if one.name in _STOPPING)


class Bar:
    """Progress on one line of a terminal; elsewhere a line at each tenth, and after every half
    minute without one, whatever takes so long. Ctrl-C, or another signal of `STOPPING`, stops between
    two steps, a second one immediately. `names`: what notes call settings (`errors.spelled`).
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = names
        self.stopped_by = 0  # the signal's number
        self.width, self.tenth = 0, ("", -1)
        self.line, self.started = "", time.monotonic()
        self.wrote = self.started
        self.closed, self.lock = threading.Event(), threading.Lock()
        self.is_terminal = sys.stderr.isatty()
        if FIRST and not self.is_terminal:
            threading.Thread(target=self._break_silence, daemon=True).start()
        is_main = threading.current_thread() is threading.main_thread()
        self.before = self._listen() if is_main else {}

    def _listen(self) -> dict[signal.Signals, Any]:
        """Take note of signals that stop, and return what each did before. One that is ignored, as
        `nohup` has a closed terminal, stays so; Ctrl-C does not, as a shell without job control
        ignores it for what it starts in the background.
        """
        before = {}
        for one in STOPPING:
            handler = signal.getsignal(one)
            if handler is not None and (handler != signal.SIG_IGN or one == signal.SIGINT):
                before[one] = signal.signal(one, self._interrupt)
        return before

    def _interrupt(self, number: int, _frame: object) -> None:
        if self.stopped_by:
            raise KeyboardInterrupt
        self.stopped_by = number

    def __call__(self, progress: Progress) -> None:
        if self.stopped_by:
            raise Cancelled(_where_it_stopped(progress))
        if not FIRST:
            return
        if progress.note:
            self.clear()
            self._write(said(spelled(progress.note, self.names), "yellow", sys.stderr))
        self._show(progress)

    def _show(self, progress: Progress) -> None:
        self.line = _line(progress)
        tenth = progress.stage, progress.step * 10 // progress.steps
        if self.is_terminal:
            print("\r" + self.line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(self.line)
        elif progress.step == progress.steps or tenth != self.tenth:
            self.tenth = tenth
            self._write(self.line)

    def _write(self, line: str) -> None:
        with self.lock:
            print(line, file=sys.stderr, flush=True)
            self.wrote = time.monotonic()

    def _break_silence(self) -> None:
        """Write the last line again, with the time since the start, whenever none was written for
        so long.
        """
        while not self.closed.wait(max(0.01, self.wrote + SILENCE - time.monotonic())):
            if time.monotonic() - self.wrote >= SILENCE:
                self._write(
                    f"{self.line or 'starting':<40}  {_clock(time.monotonic() - self.started)}"
                )

    def clear(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
            self.width = 0

    def close(self) -> None:
        self.closed.set()
        self.clear()
        for one, handler in self.before.items():
            signal.signal(one, handler)


def _where_it_stopped(progress: Progress) -> str:
    where = f"({progress.stage}, step {progress.step} of {progress.steps})"
    if progress.stage not in RESUMED:
        return where
    return f"{where} What was learned so far is kept: the same command resumes from here."


def _line(progress: Progress) -> str:
    line = f"{progress.stage:>11} {progress.step}/{progress.steps}"
    if progress.loss is not None:
        line += f"  loss {progress.loss:.4f}  rate {progress.rate:.2g}"
    if progress.seconds_left is not None:
        line += f"  {_clock(progress.seconds_left)} left"
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
