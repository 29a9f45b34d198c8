"""The same requests as JSON lines over pipes, for hosts that must stay clean. One process does one
piece of work; its end frees the GPU.

    python -m comfy_continual_lora.worker

in, the first line    {"jobs": [{"job": NAME, "request": {...}}, ...]}     done one after the other
in, later             {"stop": true}                                       stop between two steps;
what was learned is kept
in, the end           the host is gone: stop likewise, then leave
out, any number of    {"event": "progress", "stage", "step", "steps", "loss", "rate",
"seconds_left", "preview", "note"}
                      preview: JPEG in base64, or null; note: a sentence for the user, or nothing
out, the last         {"event": "done", "results": {NAME: {...}}}
                      {"event": "failed", "message": ..., "kind": ...}     kind: a class of
                      `errors`, else "Bug" with the traceback as message
                      {"event": "stopped", "message": ...}

NAME is a key of JOBS. A request has the fields of the pipeline's request of that name: paths as
strings, settings as an object of those that are not
at their default. Jobs that draw also take "out", a folder for their pictures, which come back as
paths.
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
from pathlib import Path
from typing import IO, Any

from .errors import Cancelled, ContinualLoraError, SettingError
from .progress import OnProgress, Progress

GRACE = 20.0  # seconds between the host's end and ours, for the snapshot


def learn(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from . import pipeline
    from .settings import LearnSettings

    request = _request(pipeline.LearnRequest, LearnSettings, given)
    if known := pipeline.learned_before(request):
        return {
            "token": known.token,
            "noun": known.noun,
            "loss": known.loss,
            "stack_file": str(request.stack_file),
            "again": True,
        }
    done = pipeline.learn_concept(request, on_progress)
    record = done.record
    return {
        "token": record.token,
        "noun": record.noun,
        "loss": record.loss,
        "losses": done.losses,
        "stack_file": str(done.stack_file),
    }


def consolidate(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from . import pipeline
    from .settings import ConsolidateSettings

    done = pipeline.consolidate(
        _request(pipeline.ConsolidateRequest, ConsolidateSettings, given), on_progress
    )
    return {"token": done.record.token, "losses": done.losses, "stack_file": str(done.stack_file)}


def closed_form(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`rank`, and `before` and `after`: the share of what each concept's own LoRA did that is lost."""
    from . import pipeline
    from .settings import SolveSettings

    return dataclasses.asdict(
        pipeline.consolidate_in_closed_form(
            _request(pipeline.SolveRequest, SolveSettings, given), on_progress
        )
    )


def forget(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`token`: the word of the concept to forget."""
    from . import pipeline
    from .settings import SolveSettings

    rest = {name: value for name, value in given.items() if name != "token"}
    record = pipeline.forget(
        _request(pipeline.SolveRequest, SolveSettings, rest), str(given["token"]), on_progress
    )
    return {"token": record.token, "noun": record.noun}


def scores(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`chart`: a picture of the probabilities, in the folder `out`."""
    from . import pipeline, report
    from .settings import ScoreSettings

    scored = pipeline.dc_scores(_request(pipeline.ScoreRequest, ScoreSettings, given), on_progress)
    rows = [
        {
            "file": str(one.file),
            "best": one.scores.best,
            "sure": one.scores.sure,
            "label": one.label,
            "probabilities": dict(zip(one.scores.names, one.scores.probabilities, strict=True)),
        }
        for one in scored
    ]
    return {"images": rows, "chart": _saved(report.score_sheet(scored), given, "scores.png")}


def evaluate(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`kept`: a share for each concept, null where nothing can be told; `chart`: the heat map, in
    the folder `out`.
    """
    from . import pipeline, report
    from .settings import EvaluateSettings

    found = pipeline.evaluate(
        _request(pipeline.EvaluateRequest, EvaluateSettings, given), on_progress
    )
    kept = {
        name: None if share != share else share
        for name, share in zip(found.names, found.kept.tolist(), strict=True)
    }
    return {
        "kept": kept,
        "table": report.retention_table(found),
        "chart": _saved(report.retention_sheet(found), given, "retention.png"),
    }


def draw(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from . import pipeline, report
    from .settings import DrawSettings

    drawn = pipeline.draw(_request(pipeline.DrawRequest, DrawSettings, given), on_progress)
    return {"files": [str(file) for file in report.save_pictures(drawn, Path(given["out"]))]}


def export(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`out`: folder of the LoRA, `embeddings`: of the words, if it is another; `only`: the words to
    solve a LoRA for, if not all.

    `remove_superseded`: remove this stack's earlier exports of the same concepts, which are listed
    otherwise.
    """
    from . import pipeline

    done = pipeline.export(
        Path(given["checkpoint"]),
        Path(given["out"]),
        embeddings=_path(given, "embeddings"),
        stack=_path(given, "stack"),
        only=given.get("only") or (),
        remove_superseded=bool(given.get("remove_superseded")),
        device=given.get("device", "auto"),
        on_progress=on_progress,
    )
    return done.as_json()


def undo(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`version`: the number of the version that is meant, if the stack may have changed since the
    user saw it.
    """
    from . import pipeline

    return dataclasses.asdict(
        pipeline.undo(Path(given["checkpoint"]), _path(given, "stack"), given.get("version"))
    )


def restore(given: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """`version`: the number of the version to go to."""
    from . import pipeline

    done = pipeline.restore(Path(given["checkpoint"]), int(given["version"]), _path(given, "stack"))
    return {"version": done.number, "change": done.change, "tokens": done.tokens}


JOBS: dict[str, Callable[[Mapping[str, Any], OnProgress], dict[str, Any]]] = {
    job.__name__: job
    for job in (
        learn,
        consolidate,
        closed_form,
        forget,
        scores,
        evaluate,
        draw,
        export,
        undo,
        restore,
    )
}


def _path(given: Mapping[str, Any], name: str) -> Path | None:
    return Path(given[name]) if given.get(name) else None


def _request(kind: type, settings: type, given: Mapping[str, Any]) -> Any:
    """The pipeline's request; "out" is not part of it.

    Errors: SettingError for a field it has not.
    """
    known = {f.name for f in dataclasses.fields(kind)}
    chosen = given.get("settings") or {}
    if unknown := (set(given) - known - {"out"}) | (
        set(chosen) - {f.name for f in dataclasses.fields(settings)}
    ):
        raise SettingError(
            f"{kind.__name__} has no {', '.join(sorted(unknown))}. It has "
            f"{', '.join(sorted(known))}."
        )
    values: dict[str, Any] = {
        name: value for name, value in given.items() if name in known and value is not None
    }
    for name in {"checkpoint", "stack", "images", "clip"} & values.keys():
        values[name] = (
            [Path(p) for p in values[name]]
            if isinstance(values[name], list)
            else Path(values[name])
        )
    return kind(**{**values, "settings": settings(**chosen)})


def _saved(picture: Any, given: Mapping[str, Any], name: str) -> str | None:
    if not given.get("out"):
        return None
    path = Path(given["out"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return str(path)


# --- the process
# --------------------------------------------------------------------------------------------------


class _Wire:
    """Both ends of the pipes: says events, and knows whether to stop."""

    def __init__(self, source: IO[str], target: IO[str], host_gone: Callable[[], object]) -> None:
        self.source, self.target, self.host_gone, self.stop = (
            source,
            target,
            host_gone,
            threading.Event(),
        )

    def say(self, event: str, **rest: Any) -> None:
        self.target.write(json.dumps({"event": event, **rest}) + "\n")
        self.target.flush()

    def listen(self) -> None:
        try:
            for line in self.source:
                if json.loads(line).get("stop"):
                    self.stop.set()
        except ValueError:
            pass  # no line of ours, or closed
        self.stop.set()
        self.host_gone()

    def on_progress(self, progress: Progress) -> None:
        if self.stop.is_set():
            raise Cancelled(
                f"stopped in {progress.stage} at step {progress.step} of {progress.steps}"
            )
        preview = None
        if progress.preview is not None:
            buffer = io.BytesIO()
            progress.preview.save(buffer, "JPEG", quality=90)
            preview = base64.b64encode(buffer.getvalue()).decode()
        self.say(
            "progress",
            stage=progress.stage,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
            rate=progress.rate,
            seconds_left=progress.seconds_left,
            preview=preview,
            note=progress.note,
        )


def serve(source: IO[str], target: IO[str], host_gone: Callable[[], object] = lambda: None) -> int:
    """Read the jobs, do them, tell; the exit status.

    `host_gone` is called at the end of the input.
    """
    wire = _Wire(source, target, host_gone)
    try:
        jobs = [(JOBS[one["job"]], one["request"]) for one in json.loads(source.readline())["jobs"]]
    except (ValueError, KeyError, TypeError) as error:
        wire.say(
            "failed",
            kind="Bug",
            message=f"The first line is no list of jobs this worker knows ({error!r}); it knows "
            f"{', '.join(JOBS)}.",
        )
        return 2
    threading.Thread(target=wire.listen, daemon=True).start()
    wire.say(
        "progress",
        stage="start",
        step=0,
        steps=1,
        loss=None,
        rate=None,
        seconds_left=None,
        preview=None,
        note="",
    )
    try:
        wire.say(
            "done", results={job.__name__: job(request, wire.on_progress) for job, request in jobs}
        )
        return 0
    except ContinualLoraError as error:
        wire.say("failed", kind=type(error).__name__, message=str(error))
    except Cancelled as stopped:
        wire.say("stopped", message=str(stopped))
    except BrokenPipeError:
        pass
    except Exception:
        wire.say("failed", kind="Bug", message=traceback.format_exc())
    return 1


def main() -> int:
    target = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the lines
    sys.stdout = sys.stderr
    return serve(sys.stdin, target, _leave_soon)


def _leave_soon() -> None:
    """A step may take long, and nobody is there any more."""
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
