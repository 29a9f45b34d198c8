"""The worker process and the host's side of it: the protocol, the states of a job, how it ends when
either side is killed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers_learn import save_concept

from comfy_continual_lora import worker
from comfy_continual_lora.errors import StackError
from comfy_continual_lora.files import snapshots_of, stack_path
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.requests import settings_of
from comfy_continual_lora.store import read_records
from comfy_continual_lora.webui.job import Job
from comfy_continual_lora.webui.runner import Busy, JobRunner
from comfy_continual_lora.webui.shown import status

QUICK = {"method": "lora", "steps": 2, "batch": 2, "rank": 4, "size": 64}


def _request(checkpoint: Path, pictures: Path, **settings: object) -> dict[str, object]:
    chosen = {**QUICK, **settings}
    return {
        "checkpoint": str(checkpoint),
        "images": str(pictures),
        "token": "V1",
        "noun": "ball",
        "settings": chosen,
        "device": "cpu",
    }


def _done(job: Job) -> Job:
    assert job.wait(240), job.state
    return job


@pytest.fixture
def runner() -> Iterator[JobRunner]:
    runner = JobRunner(lambda: sys.executable)
    yield runner
    if runner.job and runner.job.process:
        runner.job.process.kill()


@pytest.mark.slow
def test_a_job_learns_exports_and_tells_how_far_it_is(
    checkpoint: Path, pictures: Path, tmp_path: Path, runner: JobRunner
) -> None:
    out = tmp_path / "out"
    job = _done(
        runner.start(
            ("learn", _request(checkpoint, pictures)),
            ("export", {"checkpoint": str(checkpoint), "out": str(out)}),
        )
    )
    assert (job.state, job.message) == ("done", "")
    assert job.results["learn"]["token"] == "V1"
    assert len(job.losses) == 2
    assert Path(job.results["export"]["lora"]).parent == out
    assert job.process
    assert job.process.wait(10) == 0
    alone = _done(
        runner.start(
            (
                "export",
                {"checkpoint": str(checkpoint), "out": str(out), "only": ["V1"], "device": "cpu"},
            )
        )
    )
    assert alone.results["export"]["triggers"] == ["V1 ball"]
    again = _done(runner.start(("learn", _request(checkpoint, pictures))))
    assert again.results["learn"]["again"]
    assert (again.number, again.losses) == (3, [])


@pytest.mark.slow
def test_one_job_at_a_time_and_stop_keeps_the_snapshot(
    checkpoint: Path, pictures: Path, runner: JobRunner
) -> None:
    job = runner.start(("learn", _request(checkpoint, pictures, steps=5000, snapshot_every=1)))
    with pytest.raises(Busy, match="already running"):
        runner.start(("undo", {"checkpoint": str(checkpoint)}))
    while not job.losses:
        assert job.state in ("starting", "running"), job.message
        time.sleep(0.05)
    job.stop()
    assert job.state == "stopping"
    assert _done(job).state == "stopped"
    assert snapshots_of(stack_path(checkpoint), "V1")
    assert not stack_path(checkpoint).exists()


@pytest.mark.slow
def test_a_killed_worker_is_told_about(checkpoint: Path, pictures: Path, runner: JobRunner) -> None:
    job = runner.start(("learn", _request(checkpoint, pictures, steps=5000)))
    while not job.losses:
        time.sleep(0.05)
    assert job.process
    job.process.send_signal(signal.SIGKILL)
    assert _done(job).state == "failed"
    assert "exit status -9" in job.message
    assert "out of memory" in job.message


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"noun": ""}, "SettingError", "noun is empty"),
        ({"images": "/nowhere"}, "ConceptImagesError", "no folder /nowhere"),
        ({"settings": {"stepz": 3}}, "SettingError", "no setting 'stepz'. Did you mean steps?"),
        ({"checkpoint": "/nowhere.safetensors"}, "CheckpointError", "no checkpoint at"),
    ],
)
def test_mistakes_come_back_in_words(
    checkpoint: Path, pictures: Path, change: dict, kind: str, message: str
) -> None:
    status, last = _serve(
        {"jobs": [{"job": "learn", "request": {**_request(checkpoint, pictures), **change}}]}
    )
    assert (status, last["event"], last["kind"]) == (1, "failed", kind)
    assert message in last["message"]


@pytest.mark.parametrize(
    ("job", "request_", "marked"),
    [
        ("learn", {"token": 5}, "`token` is 5; it has to be text."),
        ("learn", {"settings": {"steps": "many"}}, "`steps` is 'many'"),
        ("learn", {"settings": {"rate": True}}, "`rate` is True"),
        ("learn", {"settings": []}, "`settings` has to be an object"),
        ("learn", {"images": 5}, "`images` is 5; it has to be a path or a list of them."),
        ("learn", {"images": ["a\0b"]}, "which is not a path"),
        ("learn", {"checkpoint": ""}, "`checkpoint` is '', which is not a path"),
        ("learn", {"checkpoint": None}, "`checkpoint` is missing"),
        ("learn", {"replace": "yes"}, "`replace` is 'yes'; it has to be true or false."),
        ("learn", {"out": "x"}, "There is no field 'out'. There are: checkpoint, "),
        ("learn", {"stack": "x" * 5000}, "which is not a path"),
        ("undo", {"version": 1.5}, "`version` is 1.5; it has to be a whole number."),
        ("draw", {"prompts": "a"}, "`prompts` is 'a'; it has to be a list of strings"),
        ("closed_form", {"settings": {"energy": float("nan")}}, "`energy` is nan"),
    ],
)
def test_wrong_types_and_fields_are_refused_in_words(
    checkpoint: Path, pictures: Path, job: str, request_: dict, marked: str
) -> None:
    """The message names fields plainly; `marked` has them in backquotes, for a host's own names."""
    place = {"checkpoint": str(checkpoint), "device": "cpu"}
    request = _request(checkpoint, pictures) if job == "learn" else place
    status, last = _serve({"jobs": [{"job": job, "request": {**request, **request_}}]})
    assert (status, last["event"], last["kind"]) == (1, "failed", "SettingError")
    assert marked in last["marked"]
    assert last["message"] == last["marked"].replace("`", "")


def _other(field: dataclasses.Field) -> object:
    """A value in its range that is not the setting's default."""
    meta, default, kind = field.metadata, field.default, str(field.type).split(" ")[0]
    if meta["choices"]:
        return next(one for one in meta["choices"] if one != default)
    if kind == "bool":
        return not default
    if kind == "str":
        return "other"
    start = default if default is not None else meta["low"]
    if kind == "int":
        return start + meta["multiple"]
    return start + 1.0 if meta["high"] is None else (meta["low"] + meta["high"]) / 2


@pytest.mark.parametrize("name", [n for n in OPERATIONS if settings_of(OPERATIONS[n].request)])
def test_every_setting_reaches_the_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the JSON of a request, through the worker, into the request the pipeline gets."""
    asked: list[Any] = []

    def operate(request: Any, _: object) -> None:
        asked.append(request)
        raise StackError("far enough")

    module = import_module(f"comfy_continual_lora.{OPERATIONS[name].module}")
    monkeypatch.setattr(module, OPERATIONS[name].function, operate)
    given = {
        "checkpoint": "c",
        "images": "i",
        "token": "V1",
        "noun": "n",
        "other": "o",
        "lora": "l",
    }
    given |= {"prompts": ["p"], "out": "o"}
    fields = {f.name for f in dataclasses.fields(OPERATIONS[name].request)}
    kind: Any = settings_of(OPERATIONS[name].request)
    for field in dataclasses.fields(kind):
        chosen = {field.name: _other(field)}
        request = {key: value for key, value in given.items() if key in fields}
        with pytest.raises(StackError, match="far enough"):
            worker.JOBS[name]({**request, "settings": chosen}, lambda _: None)
        assert asked[-1].settings == kind(**chosen) != kind()


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"jobs": 5}', "[" * 100_000])
def test_a_first_line_that_is_none_is_refused(line: str) -> None:
    target = io.StringIO()
    assert worker.serve(io.StringIO(line + "\n"), target) == 2
    assert "not a list of jobs" in json.loads(target.getvalue())["message"]


@pytest.mark.slow
def test_what_is_done_is_told_before_what_fails(
    checkpoint: Path, pictures: Path, tmp_path: Path, runner: JobRunner
) -> None:
    (tmp_path / "file").touch()
    export = {"checkpoint": str(checkpoint), "out": str(tmp_path / "file" / "out")}
    job = _done(runner.start(("learn", _request(checkpoint, pictures)), ("export", export)))
    assert (job.state, job.unfinished) == ("failed", "export")
    assert job.results["learn"]["token"] == "V1"
    assert [one.token for one in read_records(stack_path(checkpoint))] == ["V1"]
    assert "Learned V1 ball" in status(job, str)
    assert "export failed" in status(job, str)


def test_what_is_no_job_is_refused() -> None:
    status, last = _serve({"jobs": [{"job": "dance", "request": {}}]})
    assert status == 2
    assert "It knows learn, consolidate" in last["message"]


def _serve(first: dict) -> tuple[int, dict]:
    """Serve one line in this process, with the pipe left open as a living host leaves it: the exit
    status and the last event.
    """
    read, write = os.pipe()
    with os.fdopen(read) as source, os.fdopen(write, "w") as host, io.StringIO() as target:
        host.write(json.dumps(first) + "\n")
        host.flush()
        status = worker.serve(source, target)
        return status, json.loads(target.getvalue().splitlines()[-1])


def test_an_environment_that_is_missing_fails_the_job_in_words() -> None:
    def missing() -> str:
        raise OSError("no Python here")

    job = JobRunner(missing).start(("undo", {}))
    assert job.wait(10)
    assert (job.state, job.message) == ("failed", "no Python here")


HOST = """
import sys, time
from comfy_continual_lora.webui.runner import JobRunner
job = JobRunner(lambda: sys.executable).start(("learn", {request!r}))
while not job.losses:
    time.sleep(0.05)
print(job.process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_the_worker_ends_with_its_host(checkpoint: Path, pictures: Path) -> None:
    """The host is killed the hard way, so it can tell nobody: the end of the pipe does."""
    script = HOST.format(
        request=_request(checkpoint, pictures, steps=100_000, snapshot_every=100_000)
    )
    host = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert host.stdout
    with host.stdout as said:
        worker_pid = int(said.readline())
        host.kill()
        host.wait()
    deadline = time.monotonic() + 60
    while _alive(worker_pid):
        assert time.monotonic() < deadline, "the worker goes on without its host"
        time.sleep(0.2)
    assert snapshots_of(stack_path(checkpoint), "V1")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (
        status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    )  # a zombie nobody has buried yet


def test_what_runs_in_the_host_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; from comfy_continual_lora.webui import job, runner, environment; "
        "print(any(m in sys.modules for m in ('torch', 'PIL', 'numpy', 'gradio')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_pictures_come_with_the_jobs_that_draw(
    checkpoint: Path, pictures: Path, tmp_path: Path, runner: JobRunner
) -> None:
    save_concept(tmp_path / "second", 1, count=2)
    first = _request(checkpoint, pictures)
    second = {**_request(checkpoint, tmp_path / "second"), "token": "V2", "noun": "fish"}
    where, charts = {"checkpoint": str(checkpoint), "device": "cpu"}, tmp_path / "charts"
    scoring = {
        **where,
        "images": str(pictures),
        "settings": {"trials": 2, "size": 64},
        "plot": str(charts / "scores.png"),
    }
    evaluating = {
        **where,
        "settings": {"pictures": 1, "steps": 2, "trials": 2, "size": 64},
        "plot": str(charts / "retention.png"),
    }
    jobs = [("learn", first), ("evaluate", evaluating), ("scores", scoring)]
    job = _done(runner.start(*jobs))
    assert job.state == "done", job.message
    assert Path(job.results["scores"]["chart"]).exists()
    assert Path(job.results["evaluate"]["chart"]).exists()
    assert set(job.results["evaluate"]["kept"]) == {"V1 ball"}
    drawing = {**where, "prompts": ["a V1 ball"], "out": str(charts)}
    drawing["settings"] = {"steps": 2, "size": 64}
    (picture,) = _done(runner.start(("draw", drawing))).results["draw"]["files"]
    assert Path(picture).parent == charts
    assert (
        _done(runner.start(("learn", second), ("undo", {"checkpoint": str(checkpoint)}))).results[
            "undo"
        ]["token"]
        == "V2"
    )


@pytest.mark.slow
def test_what_needs_no_picture(
    checkpoint: Path, pictures: Path, tmp_path: Path, runner: JobRunner
) -> None:
    where = {"checkpoint": str(checkpoint), "device": "cpu"}
    second = {**_request(checkpoint, save_concept(tmp_path / "second", 1)), "token": "V2"}
    both = [
        ("learn", _request(checkpoint, pictures)),
        ("closed_form", {**where, "settings": {"energy": 0.99}}),
    ]
    assert "at least two concepts" in _done(runner.start(*both)).message
    job = _done(
        runner.start(
            ("learn", second), ("closed_form", where), ("forget", {**where, "token": "V1"})
        )
    )
    assert job.state == "done", job.message
    assert set(job.results["closed_form"]["after"]) == {"V1", "V2"}
    assert job.results["forget"]["token"] == "V1"
    assert [one.token for one in read_records(stack_path(checkpoint))] == ["V2"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes there")
def test_a_full_disk_is_told_and_loses_nothing(
    checkpoint: Path, pictures: Path, tmp_path: Path, runner: JobRunner
) -> None:
    """No space for the second concept, here by a limit on the size of files: the first is still
    there, and the request goes through later.
    """
    assert _done(runner.start(("learn", _request(checkpoint, pictures)))).state == "done"
    small = tmp_path / "python"
    small.write_text(f'#!/bin/sh\nulimit -f 8\nexec {sys.executable} "$@"\n')
    small.chmod(0o755)
    second = {**_request(checkpoint, save_concept(tmp_path / "second", 1)), "token": "V2"}
    job = _done(JobRunner(lambda: str(small)).start(("learn", second)))
    assert job.state == "failed"
    assert "File too large" in job.message
    stack = stack_path(checkpoint)
    assert [one.token for one in read_records(stack)] == ["V1"]
    assert not list(tmp_path.glob("*.tmp*"))
    assert _done(runner.start(("learn", second))).state == "done"
    assert [one.token for one in read_records(stack)] == ["V1", "V2"]
