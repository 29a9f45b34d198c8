"""A job always ends, whatever its worker and its host do: with real processes in the worker's
place.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora.webui import job as module
from comfy_continual_lora.webui.job import Job
from comfy_continual_lora.webui.runner import Busy, JobRunner
from comfy_continual_lora.webui.shown import status

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the workers here are shell scripts")

START = json.dumps(
    {
        "event": "progress",
        "stage": "start",
        "step": 0,
        "steps": 1,
        "loss": None,
        "rate": None,
        "seconds_left": None,
        "preview": None,
    }
)
DONE = json.dumps({"event": "done", "results": {"undo": {"token": "V1", "noun": "ball"}}})
HUGE = ("undo", {"checkpoint": "x" * 5_000_000})  # more than a pipe holds


def _program(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits in seconds, not minutes."""
    for name, seconds in (("START", 1.0), ("STOP", 1.5), ("AGAIN", 0.5), ("LEAVE", 0.5)):
        monkeypatch.setattr(module, name, seconds)


@pytest.mark.parametrize(
    ("script", "state", "message"),
    [
        ("exit 0", "failed", "did not start"),
        ("exit 3", "failed", "exit status 3"),
        ("kill -9 $$", "failed", "out of memory"),
        ("echo no worker here >&2; exit 1", "failed", "no worker here"),
        ("sleep 20", "failed", "reported nothing"),
        ("exec sleep 20 <&- >&- 2>&-", "failed", "did not start"),
        ("exec >&-; sleep 20", "failed", "did not start"),
        ("exec <&-; sleep 20", "failed", "reported nothing"),
        ("yes", "failed", "reported nothing"),
        ("while :; do :; done", "failed", "reported nothing"),
        ("sleep 20 & exit 0", "failed", "did not start"),  # a child holds the pipes
        ("trap '' TERM INT HUP; while :; do sleep 1; done", "failed", "reported nothing"),
        ("head -c 3000000 /dev/zero", "failed", "did not start"),
        ("head -c 3000 /dev/urandom", "failed", "did not start"),
        (
            "echo '{'; echo '[]'; echo null; echo 5; echo '{\"event\": 5}'; echo '{\"event\": "
            '"dance"}\'',
            "failed",
            "dance",
        ),
        (
            'echo \'{"event": "progress"}\'; echo \'{"event": "done", "results": 5}\'',
            "failed",
            "did not start",
        ),
        (f"echo '{START}'; exit 0", "failed", "ended early"),
        (f"echo '{START}'; kill -9 $$", "failed", "resumes from the last snapshot"),
        (f"echo '{START}'; exec >&-; sleep 20", "failed", "ended early"),
        (f"echo '{START}'; echo noise; echo '{DONE}'; echo noise; exit 1", "done", ""),
        (f"echo '{DONE}'; exec sleep 20", "done", ""),
        (f"echo '{DONE}'; exec >&-; sleep 20", "done", ""),
        ('echo \'{"event": "failed", "message": "so"}\'', "failed", "so"),
    ],
)
def test_a_job_ends_whatever_the_worker_does(
    tmp_path: Path, script: str, state: str, message: str
) -> None:
    program = _program(tmp_path, script)
    runner = JobRunner(lambda: program)
    job = runner.start(HUGE)
    assert job.wait(15), job.state
    assert (job.state, message in job.message) == (state, True), job.message
    assert runner.start(("undo", {})).wait(15)


def test_a_worker_gets_the_variables_of_its_host(tmp_path: Path) -> None:
    runner = JobRunner(lambda: _program(tmp_path, f"echo $NAMED > {tmp_path}/named; echo '{DONE}'"))
    runner.environment["NAMED"] = "by the host"
    assert runner.start(("undo", {})).wait(15)
    assert (tmp_path / "named").read_text() == "by the host\n"


def test_what_was_done_before_a_failure_is_known(tmp_path: Path) -> None:
    """Also where the worker is killed in the middle of a later job."""
    result = json.dumps({"event": "result", "job": "learn", "result": {"token": "V1"}})
    failed = json.dumps({"event": "failed", "message": "out is 3", "marked": "`out` is 3"})
    for last, message, marked in (
        (f"echo '{failed}'", "out is 3", "`out` is 3"),
        ("kill -9 $$", "out of memory", "out of memory"),
    ):
        program = _program(tmp_path, f"echo '{START}'; echo '{result}'; {last}")
        job = JobRunner(lambda program=program: program).start(("learn", {}), ("export", {}))
        assert job.wait(10)
        assert (job.state, job.results, job.unfinished) == (
            "failed",
            {"learn": {"token": "V1"}},
            "export",
        )
        assert message in job.message
        assert marked in job.marked


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=3) | st.just("x" * 5000), max_size=3 * module.NOTES))
def test_notes_are_kept_once_and_do_not_grow_for_ever(said: list[str]) -> None:
    """The first ones, which say what is learned from, and the newest, with a line for the rest."""
    job, half = Job(1, [("learn", {})]), module.NOTES // 2
    event = {**json.loads(START), "event": "progress"}
    for note in said:
        job._update({**event, "note": note})
    distinct = list(dict.fromkeys(note[: module._NOTE] for note in said))
    assert len(job.notes) <= module.NOTES + 1
    if len(distinct) <= module.NOTES:
        assert job.notes == distinct
        return
    assert job.notes[:half] == distinct[:half]
    assert job.notes[half].endswith(" more notes)")
    assert job.notes[-1] in distinct


def test_of_very_many_notes_the_first_and_the_newest_are_shown() -> None:
    job = Job(1, [("learn", {})])
    for number in range(100):
        job._update({**json.loads(START), "note": f"note {number}"})
    shown = status(job, str).split("\n\n")[1:]
    assert shown[:20] == [f"note {number}" for number in range(20)]
    assert shown[20] == "(60 more notes)"
    assert shown[21:] == [f"note {number}" for number in range(80, 100)]


def test_a_job_whose_program_is_not_there_ends() -> None:
    for program in ("/nowhere/python", "/", "", "nul\0", __file__):
        job = JobRunner(lambda program=program: program).start(("undo", {}))
        assert job.wait(10)
        assert (job.state, bool(job.message)) == ("failed", True)


@pytest.mark.parametrize("words", ["", f"echo '{START}';"], ids=["silent", "speaking"])
def test_stop_ends_a_worker_that_does_not_listen(tmp_path: Path, words: str) -> None:
    job = JobRunner(lambda: _program(tmp_path, f"{words} exec sleep 20")).start(HUGE)
    while job.process is None or (words and not job.progress):
        time.sleep(0.01)
    began = time.monotonic()
    job.stop()
    assert time.monotonic() - began < 0.5
    assert job.wait(10)
    assert job.state == "stopped"


def test_a_second_stop_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP", 100.0)
    job = JobRunner(lambda: _program(tmp_path, f"echo '{START}'; exec sleep 20")).start(
        ("undo", {})
    )
    while not job.progress:
        time.sleep(0.01)
    job.stop()
    job.stop()  # a double click
    assert not job.wait(0.7)
    job.stop()
    assert job.wait(5)
    assert job.state == "stopped"


def test_killed_and_stopped_at_about_the_same_time() -> None:
    draw = random.Random(1)
    for number in range(20):
        job = Job(number, [("undo", {"checkpoint": "nowhere"})])
        job.start(sys.executable)
        time.sleep(draw.uniform(0, 0.2))
        assert job.process
        job.process.kill()  # unless it has ended: nothing is there to undo
        time.sleep(draw.choice([0, 0.0005, 0.01]))
        job.stop()
        assert job.wait(5)


def test_stopped_before_it_began_it_never_starts(tmp_path: Path) -> None:
    """As while a generation of the host's runs."""
    host, left = threading.Lock(), tmp_path / "started"
    runner = JobRunner(lambda: _program(tmp_path, f"touch {left}"))

    @contextmanager
    def around(job: Job) -> Iterator[None]:
        with host:
            yield

    runner.around = around
    with host:
        job = runner.start(("undo", {}))
        job.stop()
        assert job.wait(1)
        assert job.state == "stopped"
        following = runner.start(("undo", {}))
    assert following.wait(10)
    assert left.exists()  # by the second
    assert job.process is None
    assert _is_free(host)


def _is_free(lock: threading.Lock) -> bool:
    return lock.acquire(timeout=5)


@pytest.mark.parametrize("where", ["enter", "follow", "leave", "ended"])
def test_what_goes_wrong_in_the_host_ends_no_job_and_keeps_no_lock(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = threading.Lock()
    runner = JobRunner(lambda: _program(tmp_path, f"echo '{START}'; sleep 1; echo '{DONE}'"))

    def fails(at: str) -> None:
        if at == where:
            raise RuntimeError("CUDA error")

    @contextmanager
    def around(job: Job) -> Iterator[None]:
        with host:
            fails("enter")
            yield
            fails("leave")

    runner.around, runner.follow, runner.ended = (
        around,
        lambda job: fails("follow"),
        lambda job: fails("ended"),
    )
    with caplog.at_level(logging.ERROR):
        job = runner.start(("undo", {}))
        assert job.wait(10)
        assert _is_free(host)
        host.release()
    expected = (
        ("failed", {}) if where == "enter" else ("done", {"undo": {"token": "V1", "noun": "ball"}})
    )
    assert (job.state, job.results) == expected
    assert runner.start(("undo", {})).wait(10)


def test_what_could_not_be_prepared_leaves_the_runner_free(tmp_path: Path) -> None:
    runner, tidied = JobRunner(lambda: _program(tmp_path, "sleep 1")), []
    runner.tidy = tidied.append

    def before() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        runner.start(("undo", {}), before=before)
    assert len(tidied) == 1
    job = runner.start(("undo", {}))
    with pytest.raises(Busy):
        runner.start(("undo", {}), before=before)
    assert job.wait(15)
    assert len(tidied) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to kill")
@pytest.mark.parametrize("ending", [f"echo '{DONE}'", "exit 3", "sleep 20", "kill -9 $$"])
def test_children_of_a_worker_end_with_it(tmp_path: Path, ending: str) -> None:
    """Also those that keep writing: a thread would read from them for ever."""
    program = _program(tmp_path, f"yes & echo $! > {tmp_path}/child; {ending}")
    threads = threading.active_count()
    job = JobRunner(lambda: program).start(("undo", {}))
    assert job.wait(15)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (_runs(child) or threading.active_count() > threads):
        time.sleep(0.05)
    assert not _runs(child)
    assert threading.active_count() <= threads


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_nothing_is_left_open(tmp_path: Path) -> None:
    """Pipes and threads of a hundred jobs."""
    program = _program(tmp_path, f"echo '{DONE}'")
    runner = JobRunner(lambda: program)
    assert runner.start(HUGE).wait(10)
    time.sleep(1)
    pipes, threads = (
        len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0,
        threading.active_count(),
    )
    for _ in range(30):
        assert runner.start(HUGE).wait(10)
    time.sleep(module.STOP + 1)
    if Path("/proc").exists():
        assert len(os.listdir("/proc/self/fd")) <= pipes
    assert threading.active_count() <= threads
