"""/continual-lora/v1/...: what the tab does, as plain JSON on the web UI's own server. Paths outside
the host's picture folders are refused. Needs fastapi, not gradio.

    GET  concepts?checkpoint=NAME&stack=NAME     the stack's concepts
    GET  history?checkpoint=NAME&stack=NAME      the stack's versions, the newest first
    GET  jobs                                    the running job, or the last one
    POST jobs/stop    {}                         stop it between two steps; again: immediately
    POST learn        {checkpoint, images, captions, masks, token, noun, settings, replace, stack}
    POST consolidate  {checkpoint, images, captions, masks, settings, stack}
    POST closed_form  {checkpoint, settings, stack}
    POST forget       {checkpoint, token, settings, stack}
    POST scores       {checkpoint, images, settings, stack}
    POST evaluate     {checkpoint, settings, stack}
    POST export       {checkpoint, stack, only, remove_superseded}
    POST undo         {checkpoint, stack, version}
    POST restore      {checkpoint, stack, version}

A POST that starts a job answers {"job": number}. learn, consolidate and closed_form also export.

images             pictures in base64 (with or without "data:...;base64,"), or the path of a folder,
                   in which captions and masks lie beside them (`inventory`)
captions           a text for each of `images`, or null for those without one
masks              a mask in base64 for each of `images`, or null: white is learned from, black is not
replace            learn in place of the newest concept, if that has this word
only               words, for a LoRA solved for these alone
remove_superseded  also remove this stack's earlier exports of the same concepts
version            a number in the history; for undo, the version that has to be in use

A POST takes a JSON object, sent as application/json. Fields that are not listed here are refused. It
answers 409 while another job runs, 415 or 422 for an invalid request, 503 if the worker's environment
is not prepared. GET jobs shows how a job ended: `results` by job, including those that finished before
one that failed.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..errors import ContinualLoraError, SettingError, excerpt, spelled
from ..fields import check_names
from ..files import stack_path
from ..inventory import inventory
from ..operations import OPERATIONS
from ..progress import counted
from ..requests import parse
from ..stackschema import unique_pairs
from ..versions import versions
from .copies import Batch, Sent
from .environment import NotReady
from .host import Host, JobRequest, concepts_of, newest_word, place_of
from .job import Job
from .runner import Busy
from .shown import status

PREFIX = "/continual-lora/v1"
_MOST = 500_000_000  # bytes of a request
Body = dict[str, Any]


def add_routes(app: FastAPI, host: Host) -> None:
    """Add the routes to the web UI's server, behind its API's logins if it requires any."""
    logins = host.logins()

    def login(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        password = logins.get(given.username) if logins else None
        if password is None or not secrets.compare_digest(
            given.password.encode(), password.encode()
        ):
            raise HTTPException(
                401, "Incorrect username or password", {"WWW-Authenticate": "Basic"}
            )

    guard = [] if logins is None else [Depends(login)]

    def add(path: str, endpoint: Callable[..., Any], method: str) -> None:
        app.add_api_route(
            f"{PREFIX}/{path}",
            endpoint,
            methods=[method],
            dependencies=guard,
            response_model=None,
        )

    endpoints = Endpoints(host)
    for name, fields in _GETS.items():
        add(name, _with(_query, getattr(endpoints, name), fields), "GET")
    for name, fields in _POSTS.items():
        endpoint = getattr(endpoints, name.rpartition("/")[2])
        add(name, _with(_body, endpoint, fields), "POST")


_PICTURES = ("images", "captions", "masks")
_GETS = {  # routes and their fields
    "concepts": ("checkpoint", "stack"),
    "history": ("checkpoint", "stack"),
    "jobs": (),
}
_POSTS = {
    "jobs/stop": (),
    "learn": ("checkpoint", *_PICTURES, "token", "noun", "settings", "replace", "stack"),
    "consolidate": ("checkpoint", *_PICTURES, "settings", "stack"),
    "closed_form": ("checkpoint", "settings", "stack"),
    "forget": ("checkpoint", "token", "settings", "stack"),
    "scores": ("checkpoint", "images", "settings", "stack"),
    "evaluate": ("checkpoint", "settings", "stack"),
    "export": ("checkpoint", "stack", "only", "remove_superseded"),
    "undo": ("checkpoint", "stack", "version"),
    "restore": ("checkpoint", "stack", "version"),
}


class Endpoints:
    """What each route does; errors are HTTPException."""

    def __init__(self, host: Host) -> None:
        self.host = host

    # --- GET -----------------------------------------------------------------------------------

    def concepts(self, query: Body) -> Any:
        return _plain(_asked(concepts_of, Path(self._place(query)["stack"])))

    def history(self, query: Body) -> Any:
        kept = _asked(versions, Path(self._place(query)["stack"]))
        rows = [dataclasses.asdict(one) for one in kept]
        return [{name: row[name] for name in row if name != "file"} for row in rows]

    def jobs(self, query: Body) -> Body:
        return _described(self.host.runner.job)

    # --- POST ----------------------------------------------------------------------------------

    def stop(self, body: Body) -> Body:
        self.host.stop()
        return _described(self.host.runner.job)

    def learn(self, body: Body) -> Body:
        place, token = self._place(body), _given(body, "token")
        images, batch = _images(body, self.host, place["stack"], token)
        request = {**place, "images": images, "token": token, "noun": _given(body, "noun")}
        learning = _checked("learn", {**request, **_chosen(body, "settings", "replace")})
        return self._start(learning, self.host.export_job(place), batch=batch)

    def consolidate(self, body: Body) -> Body:
        place = self._place(body)
        newest = _asked(newest_word, Path(place["stack"]))
        images, batch = _images(body, self.host, place["stack"], newest)
        request = {**place, "images": images, **_chosen(body, "settings")}
        consolidating = _checked("consolidate", request)
        return self._start(consolidating, self.host.export_job(place), batch=batch)

    def closed_form(self, body: Body) -> Body:
        place = self._place(body)
        solving = _checked("closed_form", {**place, **_chosen(body, "settings")})
        return self._start(solving, self.host.export_job(place))

    def forget(self, body: Body) -> Body:
        request = {**self._place(body), "token": _given(body, "token")}
        return self._start(_checked("forget", {**request, **_chosen(body, "settings")}))

    def scores(self, body: Body) -> Body:
        place = self._place(body)
        images, batch = _images(body, self.host, place["stack"])
        if isinstance(images, str):  # the pictures alone: its subfolders may be links to anywhere
            images = [str(file) for file in _asked(inventory, images).files]
        request = {**place, "images": images, **_chosen(body, "settings")}
        job = _checked("scores", {**request, "plot": self.host.chart("scores")})
        return self._start(job, batch=batch)

    def evaluate(self, body: Body) -> Body:
        request = {**self._place(body), **_chosen(body, "settings")}
        return self._start(_checked("evaluate", {**request, "plot": self.host.chart("retention")}))

    def export(self, body: Body) -> Body:
        name, request = self.host.export_job(self._place(body))
        options = _chosen(body, "only", "remove_superseded")
        return self._start(_checked(name, {**request, **options}))

    def undo(self, body: Body) -> Body:
        return self._start(_checked("undo", {**self._place(body), **_chosen(body, "version")}))

    def restore(self, body: Body) -> Body:
        return self._start(_checked("restore", {**self._place(body), **_chosen(body, "version")}))

    def _place(self, body: Body) -> dict[str, str]:
        paths = self.host.checkpoints()
        name = _text(body, "checkpoint")
        if name not in paths:
            known = ", ".join(paths) or "none"
            raise refused(f"There is no checkpoint {excerpt(name)}. Known: {known}.")
        stack = _asked(stack_path, paths[name], _text(body, "stack"))
        return place_of(paths[name], stack)

    def _start(self, *jobs: JobRequest, batch: Batch | None = None) -> Body:
        try:
            return {"job": self.host.hand_in(*jobs, batch=batch).number}
        except Busy as error:
            raise refused(error, 409) from None
        except NotReady as error:
            raise refused(error, 503) from None
        except OSError as error:
            why = error.strerror or error
            raise refused(f"The pictures can't be copied: {why}.", 507) from None


# --- requests ------------------------------------------------------------------------------------


def refused(why: object, status: int = 422) -> HTTPException:
    """The error response; characters that can't be sent, such as lone surrogates, are replaced."""
    return HTTPException(status, _plain(str(why)))


async def _body(request: Request) -> Body:
    """The JSON object in the body, which has to have the content type of JSON.

    That is the one content type that another site's page can't make a browser send without a CORS
    preflight.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refused("Send JSON, with the header Content-Type: application/json.", 415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MOST:
            raise refused(f"The request is larger than {_MOST // 1_000_000} MB.", 413)
        parts.append(part)
    try:
        body = json.loads(b"".join(parts), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError):
        raise refused("The body is not valid JSON, or a name occurs twice in it.") from None
    if not isinstance(body, dict):
        raise refused(
            'The body has to be a JSON object, such as {"checkpoint": "name.safetensors"}.'
        )
    return body


async def _query(request: Request) -> Body:
    return dict(request.query_params)


def _with(
    source: Callable[..., Any], endpoint: Callable[[Body], Any], fields: Collection[str]
) -> Callable[..., Any]:
    """The endpoint with what `source` reads from the HTTP request, if it has these fields alone."""

    def route(given: dict = Depends(source)) -> Any:  # noqa: B008
        try:
            check_names("field", given, fields)
        except SettingError as error:
            raise refused(error) from None
        return endpoint(given)

    route.__name__ = endpoint.__name__
    return route


def _asked(function: Callable[..., Any], *given: Any) -> Any:
    """The function's result; what it refuses is a refused request."""
    try:
        return function(*given)
    except (ContinualLoraError, OSError, ValueError) as error:
        raise refused(error) from None


def _checked(name: str, request: Body) -> JobRequest:
    """A job for the worker, with a valid request."""
    try:
        parse(OPERATIONS[name].request, request)
    except (ContinualLoraError, OSError, ValueError) as error:
        raise refused(error) from None
    return name, request


def _chosen(body: Body, *names: str) -> Body:
    """The named fields that are in the body and not null."""
    return {name: body[name] for name in names if body.get(name) is not None}


def _text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str | None):
        raise refused(f"{name} is {excerpt(value)}; it has to be a string.")
    return value or ""


def _given(body: Body, name: str) -> str:
    if not (value := _text(body, name).strip()):
        raise refused(f"{name} is missing or empty.")
    return value


def _images(
    body: Body, host: Host, stack: str, token: str = ""
) -> tuple[str | list[str], Batch | None]:
    """The folder or the paths of the request's pictures, and the batch that has to be written there
    first.
    """
    given = body.get("images")
    if isinstance(given, str):
        if body.get("captions") or body.get("masks"):
            raise refused("captions and masks of a folder have to lie in it, beside its pictures.")
        return _folder(given, host), None
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise refused("images has to be a list of pictures in base64, or the path of a folder.")
    pictures = [
        Sent(
            f"picture {number}",
            _decoded(f"picture {number}", image),
            (caption or "").strip(),
            _decoded(f"The mask of picture {number}", mask) if mask else None,
        )
        for number, (image, caption, mask) in enumerate(
            zip(given, _each(body, "captions"), _each(body, "masks"), strict=True), 1
        )
    ]
    batch = _asked(host.copies.batch, pictures, stack, token)
    return batch.paths, batch


def _each(body: Body, name: str) -> list[str | None]:
    """A text or null for each picture."""
    values, count = body.get(name), len(body["images"])
    if values is None:
        return [None] * count
    if not isinstance(values, list) or not all(isinstance(one, str | None) for one in values):
        raise refused(f"{name} has to be a list of strings or nulls, one for each picture.")
    if len(values) != count:
        found = f"{counted(len(values), name[:-1])} for {counted(count, 'picture')}"
        raise refused(f"Got {found}; give one for each.")
    return values


def _decoded(name: str, picture: str) -> bytes:
    try:
        return base64.b64decode(picture.split(",", 1)[-1], validate=True)
    except ValueError:
        raise refused(f"{name} is not valid base64.") from None


def _folder(given: str, host: Host) -> str:
    """A folder of pictures that the API may read."""
    try:
        folder = Path(given).resolve()
        allowed = [one.resolve() for one in host.picture_folders()]
    except (OSError, ValueError, RuntimeError):  # not a path, too long, a loop of links
        raise refused(f"{excerpt(given)} is not a folder.") from None
    if not any(folder.is_relative_to(one) for one in allowed):
        raise refused(
            f"{given} is outside the folders the API may read: {', '.join(map(str, allowed))}."
        )
    _asked(inventory, folder)
    return str(folder)


# --- responses -----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """The value as JSON can carry it: NaN and infinity become null, lone surrogates are replaced."""
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _described(job: Job | None) -> Body:
    if job is None:
        return {"job": None, "state": "idle"}
    described = {
        "job": job.number,
        "name": job.name,
        "state": job.state,
        "message": job.message,
        "notes": [spelled(note) for note in job.notes],
        "text": status(job, str, None),
        "failed": job.unfinished if job.state == "failed" else None,
        "progress": job.progress,
        "results": job.results,
    }
    return _plain(described)
