"""Progress on a terminal, and Ctrl-C. Light."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping

from .errors import Cancelled, spelled
from .progress import Progress

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes (`parallel`), only one prints
_RESUMED = ("learn", "calibrate", "consolidate", "fisher")  # stages a stopped run resumes from


class Bar:
    """Progress on one line of a terminal, or an occasional line elsewhere; Ctrl-C stops between two
    steps, a second one immediately. `names`: what notes call settings (`errors.spelled`).
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = names
        self.stop, self.width, self.tenth = False, 0, -1
        is_main = threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self._interrupt) if is_main else None

    def _interrupt(self, _number: int, _frame: object) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def __call__(self, progress: Progress) -> None:
        if self.stop:
            raise Cancelled(_where_it_stopped(progress))
        if not FIRST:
            return
        if progress.note:
            self.clear()
            note = spelled(progress.note, self.names)
            print(f"continual-lora: {note}", file=sys.stderr, flush=True)
        self._show(progress)

    def _show(self, progress: Progress) -> None:
        line, tenth = _line(progress), progress.step * 10 // progress.steps
        if sys.stderr.isatty():
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(line)
        elif progress.step == progress.steps or tenth != self.tenth:
            self.tenth = tenth
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
            self.width = 0

    def close(self) -> None:
        self.clear()
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _where_it_stopped(progress: Progress) -> str:
    where = f"({progress.stage}, step {progress.step} of {progress.steps})"
    if progress.stage not in _RESUMED:
        return where
    return f"{where} What was learned so far is kept: the same command resumes from here."


def _line(progress: Progress) -> str:
    line = f"{progress.stage:>11} {progress.step}/{progress.steps}"
    if progress.loss is not None:
        line += f"  loss {progress.loss:.4f}  rate {progress.rate:.2g}"
    if progress.seconds_left is not None:
        minutes, seconds = divmod(int(progress.seconds_left), 60)
        line += f"  {minutes}:{seconds:02d} left"
    return line
