"""/continual-lora/v1/...: the tab's deeds as plain JSON, on the web UI's own server. Paths outside
the host's picture folders are refused.

    GET  concepts?checkpoint=NAME&stack=NAME     the stack's concepts
    GET  jobs                                    the job under way, or the last one
    POST jobs/stop    {}                         stop it between two steps; told so once more, at
    once
    POST learn        {checkpoint, images, token, noun, settings, stack}         -> {"job": number};
    it is exported too
    POST consolidate  {checkpoint, images, settings, stack}
    POST scores       {checkpoint, images, settings, stack}
    POST evaluate     {checkpoint, settings, stack}
    POST export       {checkpoint, stack, only}      only: words, for a LoRA solved for these alone
    GET  history?checkpoint=NAME&stack=NAME      the stack's versions, the newest first
    POST undo         {checkpoint, stack, version}   version: of the history, if it has to be the
    one in use
    POST restore      {checkpoint, stack, version}

images: pictures in base64 (with or without "data:...;base64,"), or the path of a folder.

A POST takes a JSON object, sent as application/json. Answers 409 while another job runs, 415 and
422 for a request
that can't be meant, 503 where the worker's environment is not prepared; how a job ended is in GET
jobs.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..errors import SettingError
from ..files import PICTURES
from ..settings import (
    ConsolidateSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
)
from .copies import Batch
from .environment import NotReady
from .job import Busy, Job
from .shown import status
from .tab import Host, concepts_of, export_job, stack_file, versions_of

PREFIX = "/continual-lora/v1"
_MOST = 500_000_000  # bytes of a request


def add_routes(app: FastAPI, host: Host) -> None:
    """Put the routes on the web UI's server, behind its API's logins if it asks for any."""
    logins = host.logins()

    def login(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        known = logins.get(given.username) if logins else None
        if known is None or not secrets.compare_digest(given.password.encode(), known.encode()):
            raise HTTPException(
                401, "Incorrect username or password", {"WWW-Authenticate": "Basic"}
            )

    def where(body: dict[str, Any]) -> dict[str, str]:
        known, name = host.checkpoints(), _text(body, "checkpoint")
        if name not in known:
            raise refused(f"There is no checkpoint {name!r}. Known: {', '.join(known) or 'none'}.")
        try:
            return {
                "checkpoint": str(known[name]),
                "stack": str(stack_file(known[name], _text(body, "stack"))),
            }
        except ValueError as error:
            raise refused(error) from None

    def start(*jobs: tuple[str, dict[str, Any]], batch: Batch | None = None) -> dict[str, Any]:
        try:
            return {"job": host.hand_in(*jobs, batch=batch).number}
        except Busy as error:
            raise refused(error, 409) from None
        except NotReady as error:
            raise refused(error, 503) from None
        except OSError as error:
            raise refused(
                f"The pictures can't be copied: {error.strerror or error}.", 507
            ) from None

    def concepts(checkpoint: str, stack: str = "") -> Any:
        try:
            return _plain(
                concepts_of(Path(where({"checkpoint": checkpoint, "stack": stack})["stack"]))
            )
        except ValueError as error:
            raise refused(error) from None

    def history(checkpoint: str, stack: str = "") -> Any:
        try:
            found = versions_of(Path(where({"checkpoint": checkpoint, "stack": stack})["stack"]))
        except ValueError as error:
            raise refused(error) from None
        return [
            {name: value for name, value in dataclasses.asdict(one).items() if name != "file"}
            for one in found
        ]

    def jobs() -> dict[str, Any]:
        return _told(host.desk.job)

    def stop(body: dict[str, Any]) -> dict[str, Any]:
        if host.desk.job:
            host.desk.job.stop()
        return _told(host.desk.job)

    def learn(body: dict[str, Any]) -> dict[str, Any]:
        place, settings = where(body), _settings(body, LearnSettings)
        token, noun = _given(body, "token"), _given(body, "noun")
        images, batch = _images(body, host, place["stack"], token)
        request = {**place, "images": images, "token": token, "noun": noun, "settings": settings}
        return start(("learn", request), export_job(host, place), batch=batch)

    def consolidate(body: dict[str, Any]) -> dict[str, Any]:
        place, settings = where(body), _settings(body, ConsolidateSettings)
        try:
            newest = concepts_of(Path(place["stack"]))[-1:]
        except ValueError as error:
            raise refused(error) from None
        images, batch = _images(body, host, place["stack"], newest[0]["token"] if newest else "")
        return start(
            ("consolidate", {**place, "images": images, "settings": settings}),
            export_job(host, place),
            batch=batch,
        )

    def closed_form(body: dict[str, Any]) -> dict[str, Any]:
        place = where(body)
        return start(
            ("closed_form", {**place, "settings": _settings(body, SolveSettings)}),
            export_job(host, place),
        )

    def forget(body: dict[str, Any]) -> dict[str, Any]:
        request = {
            **where(body),
            "token": _given(body, "token"),
            "settings": _settings(body, SolveSettings),
        }
        return start(("forget", request))

    def scores(body: dict[str, Any]) -> dict[str, Any]:
        place, settings = where(body), _settings(body, ScoreSettings)
        images, batch = _images(body, host, place["stack"])
        request = {**place, "images": images, "settings": settings, "out": host.copies.charts()}
        return start(("scores", request), batch=batch)

    def evaluate(body: dict[str, Any]) -> dict[str, Any]:
        request = {
            **where(body),
            "settings": _settings(body, EvaluateSettings),
            "out": host.copies.charts(),
        }
        return start(("evaluate", request))

    def export(body: dict[str, Any]) -> dict[str, Any]:
        only = [] if body.get("only") is None else body["only"]
        if not isinstance(only, list) or not all(isinstance(word, str) for word in only):
            raise refused("only is no list of words.")
        return start(export_job(host, where(body), only))

    def undo(body: dict[str, Any]) -> dict[str, Any]:
        place, version = where(body), body.get("version")
        if version is not None and type(version) is not int:
            raise refused("version has to be a number, as in GET history.")
        return start(("undo", {**place, "version": version}))

    def restore(body: dict[str, Any]) -> dict[str, Any]:
        place, version = where(body), body.get("version")
        if type(version) is not int:
            raise refused("version has to be a number, as in GET history.")
        return start(("restore", {**place, "version": version}))

    guard = [] if logins is None else [Depends(login)]
    for ask in (concepts, history, jobs):
        app.add_api_route(
            f"{PREFIX}/{ask.__name__}",
            ask,
            methods=["GET"],
            dependencies=guard,
            response_model=None,
        )
    deeds = (learn, consolidate, closed_form, forget, scores, evaluate, export, undo, restore)
    for path, deed in (("jobs/stop", stop), *((deed.__name__, deed) for deed in deeds)):
        app.add_api_route(
            f"{PREFIX}/{path}",
            _with_body(deed),
            methods=["POST"],
            dependencies=guard,
            response_model=None,
        )


def refused(why: object, status: int = 422) -> HTTPException:
    """What a caller is told; a string that can't be sent, such as half a character, is made one
    that can.
    """
    return HTTPException(status, _plain(str(why)))


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent as one.

    A page of a stranger's can make a browser send anything but this content type without asking us
    first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refused("Send JSON, with the header Content-Type: application/json.", 415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MOST:
            raise refused(f"The request has more than {_MOST // 1_000_000} MB.", 413)
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise refused("The body is no JSON.") from None
    if not isinstance(body, dict):
        raise refused(
            'The body has to be a JSON object, such as {"checkpoint": "name.safetensors"}.'
        )
    return body


def _with_body(deed: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def route(body: dict = Depends(_body)) -> dict[str, Any]:  # noqa: B008
        return deed(body)

    route.__name__ = deed.__name__
    return route


def _plain(value: Any) -> Any:
    """As JSON can send it: numbers that are none become null, half characters are replaced."""
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(job: Job | None) -> dict[str, Any]:
    if job is None:
        return {"job": None, "state": "idle"}
    told = {
        "job": job.number,
        "name": job.name,
        "state": job.state,
        "message": job.message,
        "notes": job.notes,
        "text": status(job, str),
    }
    return _plain({**told, "progress": job.progress, "results": job.results})


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str | None):
        raise refused(f"{name} has to be a string.")
    return value or ""


def _given(body: dict[str, Any], name: str) -> str:
    if not (value := _text(body, name).strip()):
        raise refused(f"{name} is missing or empty.")
    return value


def _settings(body: dict[str, Any], kind: type) -> dict[str, Any]:
    settings = {} if body.get("settings") is None else body["settings"]
    if not isinstance(settings, dict):
        raise refused('settings has to be an object, such as {"steps": 500}.')
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(settings.keys() - known):
        raise refused(
            f"There is no setting {', '.join(unknown)}. There are {', '.join(sorted(known))}."
        )
    try:
        kind(**settings).check()
    except (SettingError, TypeError, ValueError) as error:
        raise refused(error) from None
    return settings


def _images(
    body: dict[str, Any], host: Host, stack: str, token: str = ""
) -> tuple[list[str], Batch | None]:
    """Paths of the pictures that are meant, and what has to be copied there first."""
    given = body.get("images")
    if isinstance(given, str):
        return _pictures_in(given, host), None
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise refused("images has to be a list of pictures in base64, or the path of a folder.")
    pictures = [(f"Picture {number}", _decoded(number, one)) for number, one in enumerate(given)]
    try:
        batch = host.copies.batch(pictures, (), stack, token)
    except ValueError as error:
        raise refused(error) from None
    return batch.paths, batch


def _decoded(number: int, picture: str) -> bytes:
    try:
        return base64.b64decode(picture.split(",", 1)[-1], validate=True)
    except ValueError:
        raise refused(f"Picture {number} is no base64.") from None


def _pictures_in(given: str, host: Host) -> list[str]:
    """The pictures of a folder that the API may read."""
    try:
        folder, allowed = Path(given).resolve(), [one.resolve() for one in host.picture_folders()]
        if not any(folder.is_relative_to(one) for one in allowed):
            raise refused(
                f"{given} is outside the folders the API may read: {', '.join(map(str, allowed))}."
            )
        found = sorted(
            str(p)
            for p in folder.glob("*")
            if p.suffix.lower() in PICTURES and not p.stem.endswith(".mask")
        )
    except (OSError, ValueError, RuntimeError):  # no path, too long, a ring of links
        raise refused(f"{given!r:.200} is no folder.") from None
    if not found:
        raise refused(f"There are no pictures in {given}.")
    return found
