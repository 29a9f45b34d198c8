"""The same requests as JSON lines over pipes, for hosts that must not load our packages. One process
per piece of work; its end frees the GPU.

    python -m comfy_continual_lora.worker

in, the first line    {"jobs": [{"job": NAME, "request": {...}}, ...]}     run one after the other
in, later             {"stop": true}         stop between two steps; what was learned is kept
in, the end           the host is gone: stop in the same way, then exit
out, any number of    {"event": "progress", "stage", "step", "steps", "loss", "rate",
                       "seconds_left", "preview", "note"}
                      preview: JPEG in base64, or null; note: a sentence for the user, with names
                      in backquotes (`errors`), or empty
out, after each job   {"event": "result", "job": NAME, "result": {...}}
out, the last         {"event": "done", "results": {NAME: {...}}}
                      {"event": "failed", "message": ..., "marked": ..., "kind": ...}
                      marked: the message with names in backquotes;
                      kind: a class of `errors`, or "Bug" with the traceback as message
                      {"event": "stopped", "message": ...}

NAME is a key of JOBS: an operation, or plan, which takes learn's request, learns nothing and answers
with what it would take (`plan.Plan`). A request has the fields of the operation's request
(`requests`): paths as strings, settings as an object of those that are not at their default. A result
is the operation's `as_json()`, except that `kept` of an evaluation is by concept name, and `file` of
scores is a name: a host may hand in copies.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from .errors import Cancelled, ContinualLoraError
from .operations import OPERATIONS
from .progress import OnProgress, Progress
from .requests import LearnRequest, parse
from .waiting import wait_briefly

GRACE = 20.0  # seconds between the host's end and ours, for the snapshot
_LIGHT = ("history", "info")  # these only read headers, which a host does itself


def run_job(name: str, given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """One operation, from the JSON of its request to the JSON of its result.

    Errors: those of `parse` and of the operation.
    """
    operation = OPERATIONS[name]
    result = operation(parse(operation.request, given), on_progress).as_json()
    if name == "evaluate":
        result["kept"] = dict(zip(result["concepts"], result["kept"], strict=True))
    if name == "scores":
        for one in result["images"]:
            one["file"] = Path(one["file"]).name
    return result


def plan_job(given: Mapping[str, Any], _: OnProgress) -> dict[str, Any]:
    """What learning would take: the fields of `plan.Plan`. Errors: those of `parse` and `plan`."""
    from . import pipeline

    return dataclasses.asdict(pipeline.plan(parse(LearnRequest, given)))


Work = Callable[[Mapping[str, Any], OnProgress], dict[str, Any]]
JOBS: dict[str, Work] = {name: partial(run_job, name) for name in OPERATIONS if name not in _LIGHT}
JOBS["plan"] = plan_job


# --- the process ---------------------------------------------------------------------------------


class _Wire:
    """Our ends of the pipes: writes events, and reads whether to stop."""

    def __init__(self, source: IO[str], target: IO[str], host_gone: Callable[[], object]) -> None:
        self.source, self.target, self.host_gone = source, target, host_gone
        self.stop = threading.Event()

    def say(self, event: str, **rest: Any) -> None:
        self.target.write(json.dumps({"event": event, **rest}) + "\n")
        self.target.flush()

    def listen(self) -> None:
        try:
            for line in self.source:
                if json.loads(line).get("stop"):
                    self.stop.set()
        except (ValueError, AttributeError, RecursionError):
            pass  # not our protocol, or closed
        self.stop.set()
        self.host_gone()

    def on_progress(self, progress: Progress) -> None:
        if self.stop.is_set():
            raise Cancelled(
                f"It stopped in {progress.stage} at step {progress.step} of {progress.steps}"
            )
        self.tell(progress)

    def tell(self, progress: Progress) -> None:
        self.say(
            "progress",
            stage=progress.stage,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
            rate=progress.rate,
            seconds_left=progress.seconds_left,
            preview=_encoded(progress),
            note=progress.note,
        )


def _encoded(progress: Progress) -> str | None:
    if progress.preview is None:
        return None
    buffer = io.BytesIO()
    progress.preview.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


def serve(source: IO[str], target: IO[str], host_gone: Callable[[], object] = lambda: None) -> int:
    """Read the jobs, run them and report; returns the exit status.

    `host_gone` is called at the end of the input.
    """
    wire = _Wire(source, target, host_gone)
    try:
        jobs = _jobs_in(source.readline())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = (
            f"The first line is not a list of jobs this worker knows ({error!r:.200}). It knows "
            f"{', '.join(JOBS)}."
        )
        wire.say("failed", kind="Bug", message=message)
        return 2
    threading.Thread(target=wire.listen, daemon=True).start()
    wire.tell(Progress("start", 0, 1))
    results = {}
    try:
        for name, request in jobs:
            results[name] = JOBS[name](request, wire.on_progress)
            wire.say("result", job=name, result=results[name])
        wire.say("done", results=results)
        return 0
    except ContinualLoraError as error:
        kind = type(error).__name__
        wire.say("failed", kind=kind, message=str(error), marked=error.marked)
    except Cancelled as stopped:
        wire.say("stopped", message=str(stopped))
    except BrokenPipeError:
        pass
    except Exception:
        wire.say("failed", kind="Bug", message=traceback.format_exc())
    return 1


def _jobs_in(line: str) -> list[tuple[str, Any]]:
    """Names and requests. Errors: ValueError, KeyError, TypeError, RecursionError."""
    jobs = [(one["job"], one["request"]) for one in json.loads(line)["jobs"]]
    for name, _ in jobs:
        if name not in JOBS:
            raise KeyError(name)
    return jobs


def main() -> int:
    wait_briefly()
    target = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the lines
    sys.stdout = sys.stderr
    return serve(sys.stdin, target, _leave_soon)


def _leave_soon() -> None:
    """Exit after a grace period: a step may take long, and the host is gone."""
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
