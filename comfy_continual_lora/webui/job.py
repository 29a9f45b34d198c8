"""A job in a worker process, as seen from the host: its state, its progress, how it ended. Standard library alone: this runs inside the host.

starting -> running -> done | failed | stopped            stopping: `stop` was called, the worker finishes its step
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
ENDED = ("done", "failed", "stopped")
_KILLED = "It was killed, most often because memory ran out: take a smaller batch or size, or another program off the machine."


class Busy(Exception):
    """One job at a time: the GPU is one too."""


class Job:
    """One worker process. Its attributes are what it told so far; `message` says in words how it ended."""

    def __init__(self, number: int, jobs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.number, self.jobs, self.state, self.message = number, list(jobs), "starting", ""
        self.progress: dict[str, Any] = {}
        self.losses: list[float] = []
        self.preview: str | None = None  # JPEG, base64
        self.results: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        self._stop, self._ended = False, threading.Event()

    @property
    def name(self) -> str:
        return self.jobs[0][0]

    def start(self, python: str) -> None:
        """Start the worker with this Python, whose packages it uses; OSError where there is none."""
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [python, "-m", "comfy_continual_lora.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace", env=environment,
        )  # fmt: skip
        self._tell({"jobs": [{"job": name, "request": dict(request)} for name, request in self.jobs]})
        self.state = "running"
        errors = threading.Thread(target=self._read_errors, daemon=True)
        errors.start()
        threading.Thread(target=self._read, args=(errors,), daemon=True).start()
        if self._stop:
            self.stop()

    def stop(self) -> None:
        """Stop between two steps; what was learned is kept."""
        self._stop = True
        if self.state == "running":
            self.state = "stopping"
            self._tell({"stop": True})

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended by then."""
        return self._ended.wait(seconds)

    def fail(self, message: str) -> None:
        self.state, self.message = "failed", message
        self._ended.set()

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self.process
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, and `_read` says how

    def _read_errors(self) -> None:
        assert self.process
        for line in self.process.stderr or ():
            self._last_words.append(line.rstrip())

    def _read(self, errors: threading.Thread) -> None:
        """Take what the worker tells; the job has ended when the process has, because only then the GPU is free."""
        assert self.process
        last: Mapping[str, Any] = {}
        with self.process:  # closes the pipes
            for line in self.process.stdout or ():
                last = json.loads(line)
                self._take(last)
            errors.join()
        if last.get("event") in ENDED:
            self.results, self.message = last.get("results", {}), last.get("message", "")
            self.state = last["event"]
            self._ended.set()
            return
        status, said = self.process.returncode, "\n".join(self._last_words)
        why = _KILLED if status in (-9, 137) else said or "It said nothing."
        again = "Give the same request again: it goes on from the last snapshot."
        self.fail(f"The worker process ended in the middle (exit status {status}). {why} {again}")

    def _take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            if event["stage"] != self.progress.get("stage") and event["loss"] is not None:
                self.losses = []  # each stage has a curve of its own
            self.progress = {name: value for name, value in event.items() if name not in ("event", "preview")}
            if event["loss"] is not None:
                self.losses.append(event["loss"])
            self.preview = event["preview"] or self.preview


class Desk:
    """Where jobs are handed in: one at a time. `around` brackets each (the host's GPU lock), `follow` is called a few times a second meanwhile."""

    def __init__(
        self, python: Callable[[], str], around: Callable[[Job], AbstractContextManager[Any]] = nullcontext,
        follow: Callable[[Job], None] = lambda job: None, ended: Callable[[Job], None] = lambda job: None,
    ) -> None:  # fmt: skip
        self.python, self.around, self.follow, self.ended = python, around, follow, ended
        self.job: Job | None = None
        self._lock = threading.Lock()

    def start(self, *jobs: tuple[str, Mapping[str, Any]]) -> Job:
        """Hand in; returns at once. Errors: Busy while another job runs."""
        with self._lock:
            if self.job and not self.job.wait(0):
                raise Busy(f"A job is under way ({self.job.name}); wait for its end, or stop it.")
            self.job = job = Job(self.job.number + 1 if self.job else 1, jobs)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()
        return job

    def _work(self, job: Job) -> None:
        try:
            with self.around(job):
                job.start(self.python())
                while not job.wait(0.3):
                    self.follow(job)
            self.ended(job)
        except Exception as error:  # the tab has to say it, whatever it is
            if job.process and job.process.poll() is None:
                job.process.kill()
            job.fail(str(error))
