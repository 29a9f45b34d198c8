"""A job in a worker process, as seen from the host: its state, its progress, how it ended.

Standard library only: this runs inside the host.

    starting -> running -> done | failed | stopped
    stopping: `stop` was called, and the worker finishes its step

A job always ends, whatever the worker does: no call blocks on it, and every wait has a timeout.
"""

from __future__ import annotations

import collections
import io
import json
import logging
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
ENDED = ("done", "failed", "stopped")
# Timeouts in seconds, after which the worker is killed:
START = 300.0  # from the start to its first event
STOP = 600.0  # from Stop to its end; one step of a large model on a CPU takes minutes
AGAIN = 5.0  # from Stop to a second Stop that kills it
LEAVE = 20.0  # from its last event to its end
_LINE = 64_000_000  # maximum bytes per line; a preview takes a hundred thousand
NOTES = 40  # of a job; of more, the first half and the newest half are kept
_NOTE = 2000  # maximum characters of a note
_KILLED = (
    "It was killed, most likely because it ran out of memory: use a smaller batch or size, or close "
    "other programs."
)
_AGAIN = "Give the same request again: it resumes from the last snapshot."


def nothing(job: Job) -> None:
    pass


class Job:
    """One worker process. The attributes hold what it has reported; `message` describes how it
    ended.

    `results` holds those of the finished jobs, by name, even if a later one fails. `marked` is the
    message with settings in backquotes (`errors`). `tidy` is called once, just before the end is
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
        self.notes: list[str] = []  # sentences for the user, such as where a stopped run resumes
        self.preview: str | None = None  # JPEG, base64
        self.results: dict[str, dict[str, Any]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._python = ""
        self._tidy, self._skipped_notes = tidy, 0
        self._final_event: dict[str, Any] | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._has_reported = False
        self._stop_time: float | None = None  # when Stop was called
        self._kill_reason = ""

    @property
    def name(self) -> str:
        return self.jobs[0][0]

    @property
    def unfinished(self) -> str:
        """The name of the first job without a result: the one that failed, if the state is failed."""
        return next((name for name, _ in self.jobs if name not in self.results), self.jobs[-1][0])

    def start(self, python: str, environment: Mapping[str, str] = {}) -> None:
        """Start the worker with this Python, its packages and more variables of the environment, unless
        the job was stopped before.

        Errors: OSError if there is no such program.
        """
        self._python = python
        self._send(
            {"jobs": [{"job": name, "request": dict(request)} for name, request in self.jobs]}
        )
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(PACKAGE_ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
        }
        with self._lock:
            if self._ended.is_set():
                return
            # Unbuffered, so that closing the pipe never waits for a worker that no longer reads.
            self.process = process = subprocess.Popen(
                [python, "-m", "comfy_continual_lora.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
                start_new_session=True,  # a group of its own, so that its children end with it
            )
            self.state = "running"
        self._kill_later(
            START, lambda: not self._has_reported, "it reported nothing for five minutes"
        )
        in_background(self._write, process)
        in_background(self._watch, process)

    def stop(self) -> None:
        """Stop between two steps; what was learned is kept.

        A worker that has not started is stopped immediately, and so is one that is stopped again a
        few seconds later.
        """
        with self._lock:
            if self._ended.is_set():
                return
            if self.process is None:
                self._end("stopped", "It had not started")
            elif self._stop_time is None:
                self.state, self._stop_time = "stopping", time.monotonic()
                self._send({"stop": True})
                self._kill_later(AGAIN, lambda: not self._has_reported, "it had not started")
                self._kill_later(STOP, lambda: True, "it did not stop when it was asked to")
            elif time.monotonic() - self._stop_time > AGAIN:
                self._kill("Stop was pressed again")

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most this long; returns whether the job has ended."""
        return self._ended.wait(seconds)

    def fail(self, message: str) -> None:
        """End the job as failed, unless it has ended; its worker is killed first."""
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
            self._outbox.put(None)
            self._ended.set()

    # --- to the worker ---------------------------------------------------------------------------

    def _send(self, message: Mapping[str, Any]) -> None:
        self._outbox.put(json.dumps(message).encode() + b"\n")

    def _write(self, process: subprocess.Popen[bytes]) -> None:
        """Only this thread may block on a worker that does not read; a closed pipe tells the worker
        that the host is gone.
        """
        assert process.stdin
        with process.stdin as pipe:
            while (data := self._outbox.get()) is not None:
                with suppress(OSError, ValueError):  # it has ended; `_watch` finds out how
                    while data:
                        data = data[pipe.write(data) :]

    def _kill(self, reason: str) -> None:
        self._kill_reason = self._kill_reason or reason
        if self.process and self.process.poll() is None:
            _kill_group(self.process)

    def _kill_later(self, seconds: float, condition: Callable[[], bool], reason: str) -> None:
        """Kill the worker if the job has not ended after this time and the condition holds."""
        in_background(lambda: self._ended.wait(seconds) or (condition() and self._kill(reason)))

    # --- from the worker -------------------------------------------------------------------------

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the worker's end; the job ends only with the process, because only then is the
        GPU free.
        """
        try:
            assert process.stdout
            assert process.stderr
            readers = [
                in_background(self._read_events, process.stdout),
                in_background(self._read_errors, process.stderr),
            ]
            while process.poll() is None and readers[0].is_alive():
                readers[0].join(0.2)
            if _gone(process, LEAVE):
                for thread in readers:
                    thread.join(1)  # a child that left the worker's group may hold a pipe open
        except Exception:
            logging.exception("continual-lora: could not follow the worker")
        finally:
            self._conclude(process)

    def _read_events(self, pipe: io.RawIOBase) -> None:
        with io.BufferedReader(pipe) as lines:
            while (line := lines.readline(_LINE)) and not self._ended.is_set():
                event = _event(line)
                if event is None:
                    self._last_lines.append(_text(line))
                    continue
                self._has_reported = True
                if event["event"] == "progress":
                    self._update(event)
                elif event["event"] == "result":
                    self.results = {**self.results, event["job"]: event["result"]}
                else:
                    self._final_event = event
                    return

    def _read_errors(self, pipe: io.RawIOBase) -> None:
        with io.BufferedReader(pipe) as lines:
            while (line := lines.readline(8192)) and not self._ended.is_set():
                self._last_lines.append(_text(line))

    def _update(self, event: dict[str, Any]) -> None:
        if event["loss"] is not None:
            if event["stage"] != self.progress.get("stage"):
                self.losses = []  # each stage has its own curve
            self.losses.append(event["loss"])
        self.preview = event["preview"] or self.preview
        if event["note"]:
            self._keep(event["note"][:_NOTE])
        self.progress = {
            name: value for name, value in event.items() if name not in ("event", "preview", "note")
        }

    def _keep(self, note: str) -> None:
        """Keep a note once. The first ones say what is learned from, the newest what happens now."""
        if note in self.notes:
            return
        notes, half = [*self.notes, note], NOTES // 2
        if len(notes) > NOTES:
            self._skipped_notes += 1
            notes = [*notes[:half], f"({self._skipped_notes} more notes)", *notes[-half:]]
        self.notes = notes

    def _conclude(self, process: subprocess.Popen[bytes]) -> None:
        """End the job by the worker's final event, or else by what happened to the process."""
        if final := self._final_event:
            self._end(final["event"], final["message"], final["marked"], final["results"])
            return
        status = process.poll()
        output = "\n".join(line for line in self._last_lines if line)
        if self._kill_reason:
            if self._stop_time is not None:
                self._end("stopped", f"The worker was killed, because {self._kill_reason}")
                return
            reason = f"It was killed, because {self._kill_reason}. {output}".strip()
        else:
            reason = _KILLED if status in (-9, 137) else output or "It reported nothing."
        if self._has_reported:
            message = f"The worker process ended early (exit status {status}). {reason} {_AGAIN}"
        else:
            message = (
                f"{self._python} did not start the worker process (exit status {status}). {reason}"
            )
        self._end("failed", message)


def in_background(work: Callable[..., object], *given: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def _gone(process: subprocess.Popen[bytes], seconds: float = 0) -> bool:
    """Give the process this long to exit, then kill it; returns whether it is gone. Its children
    are killed in any case.
    """
    for timeout in (seconds, LEAVE):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
            _kill_group(process)
            return True
        _kill_group(process)
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children; on Windows only itself."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _text(line: bytes) -> str:
    return line[:2000].decode("utf-8", "replace").rstrip()


def _event(line: bytes) -> dict[str, Any] | None:
    """A worker's event, with the types that `worker` declares; None for any other line."""
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
    counts = (event["step"], event["steps"])
    if not all(map(_is_number, counts)) or not isinstance(event["stage"], str):
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
