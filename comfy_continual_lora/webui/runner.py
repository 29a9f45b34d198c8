"""Runs a host's jobs: one at a time, each in a worker process (`job`).

Standard library only: this runs inside the host.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .job import Job, in_background, nothing


class Busy(Exception):
    """Another job is running; there is only one GPU."""


class JobRunner:
    """Runs one job at a time.

    `around` is a context manager around each job (the host's GPU lock), `follow` is called a few
    times a second while it runs, `ended` afterwards, and then `after`, when another may start. `tidy`
    is called when a job has ended, before its end is shown, and after one that could not be started.
    `environment`: more variables for the worker.
    """

    def __init__(self, python: Callable[[], str]) -> None:
        self.python = python
        self.around: Callable[[Job], AbstractContextManager[Any]] = nullcontext
        self.follow: Callable[[Job], object] = nothing
        self.ended: Callable[[Job], object] = nothing
        self.after: Callable[[Job], object] = nothing
        self.tidy: Callable[[Job], object] = nothing
        self.environment: dict[str, str] = {}
        self.job: Job | None = None
        self._lock, self._complaint = threading.Lock(), ""

    @property
    def is_busy(self) -> bool:
        return bool(self.job and not self.job.wait(0))

    def start(
        self, *jobs: tuple[str, Mapping[str, Any]], before: Callable[[], object] = lambda: None
    ) -> Job:
        """Start a job; returns immediately. `before` is called first, if no other job is running.

        Errors: Busy while another job runs; those of `before`.
        """
        with self._lock:
            if self.job and self.is_busy:
                raise Busy(
                    f"A job is already running ({self.job.name}); wait until it ends, or stop it."
                )
            job = Job(self.job.number + 1 if self.job else 1, jobs, self.tidy)
            try:
                before()
            except BaseException:
                self.tidy(job)
                raise
            self.job = job
        in_background(self._work, job)
        return job

    def _work(self, job: Job) -> None:
        try:
            with self.around(job):
                if not job.wait(0):
                    job.start(self.python(), self.environment)
                while not job.wait(0.3):
                    self._quietly(self.follow, job)
        except Exception as error:
            # whatever it is, the tab has to show it; what is stored stays stored
            if job.wait(0):
                logging.exception("continual-lora: after the job")
            job.fail(str(error) or type(error).__name__)
        finally:
            self._quietly(self.ended, job)
            self._quietly(self.after, job)

    def _quietly(self, call: Callable[[Job], object], job: Job) -> None:
        """A failure in the host's callbacks must not end the job; it is logged once."""
        try:
            call(job)
        except Exception as error:
            if repr(error) != self._complaint:
                self._complaint = repr(error)
                logging.exception("continual-lora: the host could not follow the job")
