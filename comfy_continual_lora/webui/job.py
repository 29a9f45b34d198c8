"""A job in a worker process, as seen from the host: its state, its progress, how it ended.

Standard library alone: this runs inside the host.

starting -> running -> done | failed | stopped
stopping: `stop` was called, and the worker finishes its step

A job always ends, whatever the worker does or fails to do: no call waits for it, and each silence
has a limit.
"""

from __future__ import annotations

import collections
import io
import json
import logging
import math
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
ENDED = ("done", "failed", "stopped")
# Limits in seconds, after which the worker is killed:
START = 300.0  # from the start to its first word
STOP = 600.0  # from Stop to its end; one step of a large model on a CPU takes minutes
AGAIN = 5.0  # from Stop to a second one that means it
LEAVE = 20.0  # from its last word to its end
_LINE = 64_000_000  # bytes of its longest line; a preview takes a hundred thousand
_KILLED = (
    "It was killed, most often because it ran out of memory: take a smaller batch or size, or another "
    "program off the machine."
)
_AGAIN = "Give the same request again: it goes on from the last snapshot."


def nothing(job: Job) -> None:
    pass


class Job:
    """One worker process. Its attributes are what it has reported; `message` says in words how it
    ended.

    `results` are those of the jobs that are done, by name, also where a later one fails. `marked` is
    the message with settings in backquotes (`errors`). `tidy` is called once, just before the end is
    shown.
    """

    def __init__(
        self,
        number: int,
        jobs: Sequence[tuple[str, Mapping[str, Any]]],
        tidy: Callable[[Job], object] = nothing,
    ) -> None:
        self.number, self.jobs = number, list(jobs)
        self.state, self.message, self.marked = "starting", "", ""
        self.progress: dict[str, Any] = {}
        self.losses: list[float] = []
        self.notes: list[str] = []  # sentences for the user, such as where a stopped run goes on
        self.preview: str | None = None  # JPEG, base64
        self.results: dict[str, dict[str, Any]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._python = ""
        self._tidy = tidy
        self._last: dict[str, Any] | None = None  # the event of its end
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        self._to_tell: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock, self._ended, self._spoke = threading.RLock(), threading.Event(), False
        self._asked: float | None = None  # when Stop was called
        self._killed = ""  # why we did

    @property
    def name(self) -> str:
        return self.jobs[0][0]

    @property
    def unfinished(self) -> str:
        """The name of the first of its jobs that has no result: that one failed, where it failed."""
        return next((name for name, _ in self.jobs if name not in self.results), self.jobs[-1][0])

    def start(self, python: str) -> None:
        """Start the worker with this Python, whose packages it uses; nothing if it was stopped
        before.

        Errors: OSError if there is no such program.
        """
        self._python = python
        self._tell(
            {"jobs": [{"job": name, "request": dict(request)} for name, request in self.jobs]}
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(PACKAGE_ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
        }
        with self._lock:
            if self._ended.is_set():
                return
            # Unbuffered, so that closing the pipe never waits for a worker that reads no more.
            self.process = process = subprocess.Popen(
                [python, "-m", "comfy_continual_lora.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
            )
            self.state = "running"
        self._later(START, lambda: not self._spoke, "it reported nothing for five minutes")
        in_background(self._write, process)
        in_background(self._watch, process)

    def stop(self) -> None:
        """Stop between two steps; what was learned is kept.

        A worker that has not begun is stopped at once, and so is one that is stopped once more a few
        seconds later.
        """
        with self._lock:
            if self._ended.is_set():
                return
            if self.process is None:
                self._end("stopped", "It had not begun")
            elif self._asked is None:
                self.state, self._asked = "stopping", time.monotonic()
                self._tell({"stop": True})
                self._later(AGAIN, lambda: not self._spoke, "it had not begun")
                self._later(STOP, lambda: True, "it did not stop when it was asked to")
            elif time.monotonic() - self._asked > AGAIN:
                self._kill("Stop was pressed again")

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended by then."""
        return self._ended.wait(seconds)

    def fail(self, message: str) -> None:
        """End it as failed, if it has not ended; its worker is gone afterwards."""
        if self._ended.is_set():
            return
        self._kill(message)
        if self.process:
            _gone(self.process)
        self._end("failed", message)

    def _end(
        self,
        state: str,
        message: str,
        marked: str = "",
        results: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """The first end counts."""
        with self._lock:
            if self._ended.is_set():
                return
            try:
                self._tidy(self)
            except Exception:
                logging.exception("continual-lora: could not tidy up")
            self.results = results or self.results
            self.message, self.marked, self.state = message, marked or message, state
            self._to_tell.put(None)
            self._ended.set()

    # --- to the worker ---------------------------------------------------------------------------

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._to_tell.put(json.dumps(message).encode() + b"\n")

    def _write(self, process: subprocess.Popen[bytes]) -> None:
        """Only this thread may wait for a worker that does not read; the pipe's end tells it that
        we are gone.
        """
        assert process.stdin
        with process.stdin as pipe:
            while (data := self._to_tell.get()) is not None:
                with suppress(OSError, ValueError):  # it has ended, and `_watch` says how
                    while data:
                        data = data[pipe.write(data) :]

    def _kill(self, why: str) -> None:
        self._killed = self._killed or why
        if self.process and self.process.poll() is None:
            self.process.kill()

    def _later(self, seconds: float, when: Callable[[], bool], why: str) -> None:
        """Kill it after a time in which it has not ended, if it must be."""
        in_background(lambda: self._ended.wait(seconds) or (when() and self._kill(why)))

    # --- from the worker -------------------------------------------------------------------------

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its end; the job has ended when the process has, because only then the GPU is
        free.
        """
        try:
            assert process.stdout
            assert process.stderr
            hearing = [
                in_background(self._hear, process.stdout),
                in_background(self._overhear, process.stderr),
            ]
            while process.poll() is None and hearing[0].is_alive():
                hearing[0].join(0.2)
            if _gone(process, LEAVE):
                for thread in hearing:
                    thread.join(1)  # a child of the worker's may hold a pipe open
        except Exception:
            logging.exception("continual-lora: could not follow the worker")
        finally:
            self._conclude(process)

    def _hear(self, pipe: io.RawIOBase) -> None:
        with io.BufferedReader(pipe) as lines:
            while line := lines.readline(_LINE):
                event = _event(line)
                if event is None:
                    self._last_words.append(_text(line))
                    continue
                self._spoke = True
                if event["event"] == "progress":
                    self._take(event)
                elif event["event"] == "result":
                    self.results = {**self.results, event["job"]: event["result"]}
                else:
                    self._last = event
                    return

    def _overhear(self, pipe: io.RawIOBase) -> None:
        with io.BufferedReader(pipe) as lines:
            while line := lines.readline(8192):
                self._last_words.append(_text(line))

    def _take(self, event: dict[str, Any]) -> None:
        if event["loss"] is not None:
            if event["stage"] != self.progress.get("stage"):
                self.losses = []  # each stage has a curve of its own
            self.losses.append(event["loss"])
        self.preview = event["preview"] or self.preview
        if event["note"] and event["note"] not in self.notes:
            self.notes = [*self.notes[-9:], event["note"]]
        self.progress = {
            name: value for name, value in event.items() if name not in ("event", "preview", "note")
        }

    def _conclude(self, process: subprocess.Popen[bytes]) -> None:
        """Its last event, else what became of it."""
        if self._last:
            last = self._last
            self._end(last["event"], last["message"], last["marked"], last["results"])
            return
        status = process.poll()
        words = "\n".join(line for line in self._last_words if line)
        if self._killed:
            if self._asked is not None:
                self._end("stopped", f"The worker was ended, because {self._killed}")
                return
            why = f"It was ended, because {self._killed}. {words}".strip()
        else:
            why = _KILLED if status in (-9, 137) else words or "It reported nothing."
        if self._spoke:
            self._end(
                "failed",
                f"The worker process ended in the middle (exit status {status}). {why} {_AGAIN}",
            )
        else:
            self._end(
                "failed",
                f"{self._python} did not start the worker process (exit status {status}). {why}",
            )


def in_background(work: Callable[..., object], *given: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def _gone(process: subprocess.Popen[bytes], seconds: float = 0) -> bool:
    """Give it that long to leave, then kill it; whether it is gone."""
    for patience in (seconds, LEAVE):
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return True
        process.kill()
    return False


def _text(line: bytes) -> str:
    return line[:2000].decode("utf-8", "replace").rstrip()


def _event(line: bytes) -> dict[str, Any] | None:
    """A worker's event, with the types that `worker` declares; None for a line that is none."""
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            return _progress(event)
        if event["event"] == "result":
            fits = isinstance(event["job"], str) and isinstance(event["result"], dict)
            return event if fits else None
        return _last_event(event) if event["event"] in ENDED else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _last_event(event: dict[str, Any]) -> dict[str, Any] | None:
    message, marked = event.get("message", ""), event.get("marked", "")
    results = event.get("results", {})
    if not isinstance(message, str) or not isinstance(marked, str):
        return None
    if not all(isinstance(one, dict) for one in results.values()):
        return None
    return {"event": event["event"], "message": message, "marked": marked, "results": results}


def _progress(event: dict[str, Any]) -> dict[str, Any] | None:
    numbers = {name: event[name] for name in ("loss", "rate", "seconds_left")}
    if not all(value is None or _is_number(value) for value in numbers.values()):
        return None
    if (
        not _is_number(event["step"])
        or not _is_number(event["steps"])
        or not isinstance(event["stage"], str)
    ):
        return None
    note = event.get("note", "")
    if not isinstance(event["preview"], str | None) or not isinstance(note, str):
        return None
    return {
        **{name: event[name] for name in ("event", "stage", "step", "steps", "preview")},
        **numbers,
        "note": note,
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
