"""The tab: what a click asks for, what is shown, and the whole path in a browser with
`continual-lora ui`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_browser import CHROMIUM, page, type_beside, wait_for_text
from helpers_messages import marked_names
from helpers_server import free_port
from helpers_webui import asks_first, fill_settings
from PIL import Image

gradio = pytest.importorskip("gradio")

from comfy_continual_lora import pipeline  # noqa: E402
from comfy_continual_lora.errors import SettingError, StackError  # noqa: E402
from comfy_continual_lora.files import stack_path  # noqa: E402
from comfy_continual_lora.operations import OPERATIONS  # noqa: E402
from comfy_continual_lora.requests import LearnRequest, parse  # noqa: E402
from comfy_continual_lora.settings import LearnSettings  # noqa: E402
from comfy_continual_lora.store import read_records  # noqa: E402
from comfy_continual_lora.versions import versions  # noqa: E402
from comfy_continual_lora.webui import alone, host, shown, uploads  # noqa: E402
from comfy_continual_lora.webui.environment import REQUIREMENTS  # noqa: E402
from comfy_continual_lora.webui.handlers import ADVANCED, ASKING, OUTPUTS, Handlers  # noqa: E402
from comfy_continual_lora.webui.job import Job  # noqa: E402
from comfy_continual_lora.webui.labels import METHOD_LABELS, label_of  # noqa: E402

ROOT = Path(__file__).parents[1]
# What messages may name though the tab shows no part for it: what belongs to operations and settings
# that only other front ends have
NOT_IN_THE_TAB = {
    *("import", "embedding", "trigger", "strength", "prompts", "out", "format"),
    *("settings", "optimizer", "ridge", "rows", "keep", "other"),
}


def test_the_environment_asks_for_what_the_package_does() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert declared
    assert tuple(re.findall(r'"(.+?)"', declared[1])) == REQUIREMENTS


def test_widgets_become_the_settings_that_differ() -> None:
    names = ("method", "steps", "flip", "rate", "checkpointing", "seed")
    untouched = ("lora", 0, "auto", 0, False, 0)
    assert uploads.settings_of(LearnSettings, names, untouched) == {"method": "lora"}
    changed = (LearnSettings().method, 40.0, "no", 0.001, True, 3.0)
    assert uploads.settings_of(LearnSettings, names, changed) == {
        "steps": 40,
        "flip": False,
        "rate": 0.001,
        "checkpointing": True,
        "seed": 3,
    }


def test_the_table_reads_a_stack_without_torch(checkpoint: Path, pictures: Path) -> None:
    quick = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)
    pipeline.learn_concept(LearnRequest(checkpoint, pictures, "V1", "<ball>", quick, device="cpu"))
    stack = stack_path(checkpoint)
    table = shown.table(host.concepts_of(stack), {"V1 <ball>": 0.5})
    assert "&lt;ball&gt;" in table
    assert "50 %" in table
    assert "learned V1 &lt;ball&gt;" in shown.history(versions(stack))
    assert host.concepts_of(stack.with_name("none")) == []
    stack.write_bytes(stack.read_bytes()[:100])
    with pytest.raises(StackError, match=r"can't be (read|used)|damaged"):
        host.concepts_of(stack)
    page = Handlers(host.Host(checkpoint.parent, checkpoint.parent / "work"))
    assert "can&#x27;t be read" in page.stack_shown(checkpoint.name, "")[0]
    assert "only letters" in page.stack_shown(checkpoint.name, "../up")[0]


def test_captions_are_read_whatever_columns_there_are() -> None:
    assert uploads.typed([["0.png", "a ball", "more"], ["1.png", ""]]) == {
        "0.png": "a ball",
        "1.png": "",
    }
    assert uploads.typed([[]]) == {}  # gradio 3 after the pictures were cleared


def test_every_state_of_a_job_is_described() -> None:
    job = Job(1, [("learn", {})])
    assert shown.status(None) == "Ready."
    assert "Starting" in shown.status(job)
    job.progress = {"stage": "learn", "step": 3, "steps": 9, "loss": 0.125, "seconds_left": 61.0}
    assert shown.status(job) == "**learn** step 3 of 9, loss 0.1250, 1:01 left"
    job.state, job.notes = "stopping", ["Going on from step 3"]
    assert "stopping after this step" in shown.status(job)
    assert shown.status(job).endswith("\n\nGoing on from step 3")
    job.state, job.message, job.notes = "stopped", "at step 4", []
    assert "kept" in shown.status(job)
    job.state, job.message = "failed", "no room"
    assert shown.status(job) == "**learn failed.** no room"
    job.message, job.marked = "stack is 3, token_rate is 5", "`stack` is 3, `token_rate` is 5"
    assert shown.status(job, str) == "**learn failed.** Stack is 3, token rate is 5"
    assert shown.status(job, str, None) == "**learn failed.** stack is 3, token_rate is 5"
    export = {
        "lora": "/x/a-1.safetensors",
        "triggers": ["V1 ball"],
        "notes": ["V1 is another file's name there."],
    }
    job.state, job.results = "done", {"learn": {"token": "V1", "noun": "ball"}, "export": export}
    assert "a photo of a V1 ball* <lora:a-1:1>" in shown.status(job, str)
    assert "another file's name" in shown.status(job, str)
    undone = {"change": "forgot V1 ball", "token": "V1", "noun": "ball", "tokens": ["V1"]}
    restored = {"version": 2, "change": "learned V1 ball", "tokens": []}
    job.results = {"undo": {**undone, "version": 3}, "restore": restored}
    status = shown.status(job, str)
    assert "Undone: forgot V1 ball.** The stack now holds V1." in status
    assert "Went back to version 2: learned V1 ball.** The stack now holds no concept." in status


def test_a_failed_export_hides_no_concept() -> None:
    job = Job(1, [("learn", {}), ("export", {})])
    job.results = {"learn": {"token": "V1", "noun": "ball", "losses": [], "again": False}}
    job.state, job.message, job.marked = "failed", "out is full", "`out` is full"
    assert shown.status(job, str).split("\n\n") == [
        "**Learned V1 ball**.",
        "What was done so far is stored.",
        "**export failed.** out is full",
    ]


@pytest.fixture
def handlers(checkpoint: Path, tmp_path: Path) -> Iterator[Handlers]:
    """Those of a page whose worker is not a Python, so that its jobs fail at once."""
    page_host = host.Host(checkpoint.parent, tmp_path / "work")
    page_host.runner.python = lambda: os.devnull
    yield Handlers(page_host)
    if page_host.runner.job:
        page_host.runner.job.fail("over")


def _request(handlers: Handlers, name: str) -> dict[str, Any]:
    """The job's request for this operation; all its requests are ones the worker accepts."""
    job = handlers.host.runner.job
    assert job
    requests = dict(job.jobs)
    for operation, request in job.jobs:
        parse(OPERATIONS[operation].request, request)
    return dict(requests[name])


def test_what_is_clicked_reaches_the_worker(
    handlers: Handlers, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(pictures.parent))
    place = ("mini.safetensors", "")
    files = [str(path) for path in sorted(pictures.glob("*.png"))]
    defaults = {f.name: f.default for f in dataclasses.fields(LearnSettings)}
    values = ["auto" if name == "flip" else defaults[name] or 0 for name in ADVANCED]
    paper = next(label for label, name in METHOD_LABELS.items() if name == "lora_dsc_ewc_dc")
    words = (" V1 ", "ball", paper)
    for replace in (False, True):
        outputs = handlers.learn(*place, files, [], *words, replace, *values)
        assert len(outputs) == len(OUTPUTS)
        request = _request(handlers, "learn")
        assert (request["token"], request["noun"], request["replace"]) == ("V1", "ball", replace)
        assert request["settings"] == {"method": "lora_dsc_ewc_dc"}
        assert handlers.host.runner.job
        assert handlers.host.runner.job.wait(20)
    for remove in (False, True):
        handlers.export(*place, remove)
        assert _request(handlers, "export")["remove_superseded"] is remove
        assert handlers.host.runner.job.wait(20)
        handlers.export_some(*place, remove, "V1, V2")
        request = _request(handlers, "export")
        assert (request["only"], request["remove_superseded"]) == (["V1", "V2"], remove)
        assert handlers.host.runner.job.wait(20)
    values[ADVANCED.index("dsc_steps")] = values[ADVANCED.index("steps")] = 7
    for click, arguments, name in (
        (handlers.consolidate, (files, [], *values), "consolidate"),
        (handlers.closed_form, (), "closed_form"),
        (handlers.scores, (files,), "scores"),
        (handlers.evaluate, (), "evaluate"),
    ):
        click(*place, *arguments)
        request = _request(handlers, name)
        assert request["checkpoint"].endswith("mini.safetensors")
        assert request.get("settings", {}) == ({"dsc_steps": 7} if name == "consolidate" else {})
        assert handlers.host.runner.job.wait(20)


def test_what_is_dropped_is_used_or_named(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, captions and masks, each in a folder of its own, as gradio keeps uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = {}
    for name in ("a.jpg", "b.PNG", "a.mask.png", "a.caption", "b.txt", "IMG_2.HEIC", "cut.jpg"):
        files[name] = tmp_path / name[::-1] / name
        files[name].parent.mkdir()
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(files["a.jpg"])
    Image.new("RGB", (16, 12), "blue").save(files["b.PNG"])
    Image.new("L", (16, 12), "white").save(files["a.mask.png"])
    files["a.caption"].write_bytes("on a café's table".encode("utf-16"))
    files["b.txt"].write_text("dropped")
    files["IMG_2.HEIC"].write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    files["cut.jpg"].write_bytes(files["a.jpg"].read_bytes()[:300])
    given = [str(file) for file in files.values()]
    gallery, rows, told = handlers.thumbnails(given, [["b.PNG", "typed"]])
    assert [name for _, name in gallery] == ["a.jpg", "b.PNG"]
    assert gallery[0][0].mode == "RGB"
    assert gallery[0][0].getpixel((5, 5))[0] > 200 > gallery[0][0].getpixel((5, 5))[2]
    assert rows == [["a.jpg", "on a café's table"], ["b.PNG", "typed"], ["cut.jpg", ""]]
    told = html.unescape(told).split("<br>")
    assert told[0] == (
        "3 pictures, 2 captions (.txt, .caption), 1 mask; left out: IMG_2.HEIC (convert it)"
    )
    assert told[-1].startswith("cut.jpg: can't be read as a picture")
    assert "cut.jpg can't be read" in html.unescape(
        handlers.scores("mini.safetensors", "", given)[0]
    )
    assert handlers.thumbnails([], []) == [[], [], ""]
    emptied = uploads.found_in(given[:-1], [["a.jpg", ""]])
    assert [one.caption for one in emptied] == ["", "dropped"]
    sent = uploads.found_in(given[:-1], [["b.PNG", "typed"]])
    assert [one.name for one in sent] == ["a.jpg", "b.PNG"]
    assert [one.caption for one in sent] == ["on a café's table", "typed"]
    assert [one.mask for one in sent] == [files["a.mask.png"].read_bytes(), None]


def test_a_refusal_names_fields_by_their_labels(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Choose a checkpoint first" in handlers.export("", "", False)[0]
    assert "No pictures yet" in handlers.scores("mini.safetensors", "", [])[0]

    def refuses(*_: object, **__: object) -> None:
        raise SettingError("Start another `stack`; `ewc_strength` is 3.")

    monkeypatch.setattr(handlers.host, "hand_in", refuses)
    message = html.unescape(handlers.export("mini.safetensors", "", False)[0])
    assert message == "**Start another Stack; ewc strength is 3.**"
    assert len(handlers.ask("undo")("mini.safetensors", "")) == len(OUTPUTS) + len(ASKING)


def test_the_page_has_every_part_and_label(tmp_path: Path) -> None:
    """In a process of its own: gradio leaves event loops open."""
    code = (
        "import sys, pathlib, gradio; from comfy_continual_lora.webui import host, tab\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with gradio.Blocks() as page:\n"
        "    tab.build(host.Host(folder, folder / 'work'), page)\n"
        "for part in page.blocks.values():\n"
        "    print(getattr(part, 'label', None))\n"
        "    print(getattr(part, 'value', None))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seen = [line.removesuffix(" ...") for line in result.stdout.splitlines()]
    named = {*ADVANCED, *marked_names()} - NOT_IN_THE_TAB
    for name in ("images", "replace", "remove_superseded", "stack", "history", *named):
        assert any(line.startswith(label_of(name)) for line in seen), (name, result.stderr)


def test_no_file_is_read_that_was_named_but_not_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gradio 3 hands over a copy of whatever file of this machine a request names, and the name."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    inside, outside = tmp_path / "uploads" / "a" / "0.png", tmp_path / "secret.txt"
    for path in (inside, outside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    link = tmp_path / "uploads" / "link.txt"
    link.symlink_to(outside)
    old = SimpleNamespace(name=str(inside), orig_name=str(inside))
    assert uploads.uploaded([str(inside), inside, old]) == [inside] * 3
    assert uploads.uploaded(None) == []
    copied = SimpleNamespace(name=str(inside), orig_name=str(outside))
    copied_by_name = SimpleNamespace(name=str(inside), orig_name="secret.txt")
    above = str(tmp_path / "uploads" / ".." / "secret.txt")
    for bad in (str(outside), outside, copied, copied_by_name, above, link, "secret.txt"):
        with pytest.raises(ValueError, match="not uploaded"):
            uploads.uploaded([inside, bad])


def test_environment_variables_choose_what_no_page_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_host = host.Host(tmp_path, tmp_path / "work")
    assert page_host.python() == sys.executable
    assert page_host.picture_folders() == [tmp_path / "work" / "pictures"]
    monkeypatch.setenv("CONTINUAL_LORA_PYTHON", "/opt/python")
    monkeypatch.setenv("CONTINUAL_LORA_FOLDERS", os.pathsep.join(["/a b;c", "", "/d"]))
    assert page_host.python() == "/opt/python"
    assert page_host.picture_folders()[1:] == [Path("/a b;c"), Path("/d")]
    assert list(tmp_path.iterdir()) == []


LOCAL = {"host": "127.0.0.1:7860"}


@pytest.mark.parametrize(
    "headers",
    [
        LOCAL,
        {"host": "localhost"},
        {"host": "LOCALHOST:1"},
        {"host": "[::1]:7860", "origin": "http://[::1]:7860", "sec-fetch-site": "same-origin"},
        {**LOCAL, "sec-fetch-site": "none"},
        {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-dest": "document"},
    ],
)
def test_pages_of_this_machine_are_answered(headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert alone.is_own("GET", sent)
    if "sec-fetch-dest" in headers:  # a link leads here; a form of another page does not
        assert not alone.is_own("POST", sent)
    assert not alone.is_own("GET", [*sent, (b"Host", b"evil.example")])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "evil.example:127.0.0.1"},
        {"host": "localhost/evil"},
        {"host": "localhost:x"},
        {"host": "0.0.0.0:7860"},
        {**LOCAL, "origin": "null"},
        {**LOCAL, "origin": "http://evil.example"},
        {**LOCAL, "origin": "http://127.0.0.1:8000"},
        {**LOCAL, "origin": ""},
        {**LOCAL, "sec-fetch-site": "cross-site"},
        {**LOCAL, "sec-fetch-site": "same-site", "sec-fetch-dest": "empty"},
        {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"},
    ],
)
def test_other_pages_are_not_answered(headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert not alone.is_own("GET", sent)
    if "sec-fetch-dest" in headers:
        assert not alone.is_own("POST", sent)
    assert not alone.is_own("GET", [*sent, (b"Host", b"evil.example")])


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of `continual-lora ui` on that folder of checkpoints."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "comfy_continual_lora",
        "ui",
        "--models",
        str(folder),
        "--port",
        str(port),
        "--no-browser",
    ]
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as server,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _status(address: str, path: str, data: bytes | None = None, **headers: str) -> int:
    """The status of a request whose path and headers are sent as they are."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request("GET" if data is None else "POST", path, data, names)
        return connection.getresponse().status


FILE_PREFIXES = (
    "/gradio_api/file=",
    "/file=",
    "/static/",
    "/assets/",
    "/gradio_api/file/",
    "/file/",
)


@pytest.mark.slow
def test_the_tab_by_itself_serves_its_exports_to_its_own_pages(checkpoint: Path) -> None:
    """With real requests: no checkpoint, stack, picture, program file or system file is served, and
    nothing to other pages.
    """
    folder = checkpoint.parent
    work = folder / "continual-lora"
    files = [
        work / "exports" / "a.txt",
        work / "copies" / "a" / "b" / "000.png",
        work / "pictures" / "0.png",
        folder / "mini.concepts.safetensors",
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("content")
    with _served(folder) as address:
        assert _status(address, "/") == 200
        root = "/gradio_api" if _status(address, "/gradio_api/info") == 200 else ""
        assert _status(address, f"{root}/file={files[0]}") == 200
        hidden = [
            *map(str, files[1:]),
            str(checkpoint),
            str(ROOT / "pyproject.toml"),
            "pyproject.toml",
            "/etc/passwd",
            f"{files[0]}/../../../log",
        ]
        for path in hidden:
            for prefix in FILE_PREFIXES:
                assert _status(address, f"{prefix}{path}") in (403, 404), prefix + path
        port = address.rpartition(":")[2]
        own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        assert _status(address, "/config", **own) == 200
        body = json.dumps({"data": ["", ""], "fn_index": 1, "session_hash": "x"}).encode()
        routes = ("queue/join", "run/predict", "upload", "call/view")
        foreign_headers = (
            {"Host": f"evil.example:{port}"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site", "Content_Type": "text/plain"},
        )
        for path in ("/", "/config", *(f"{root}/{route}" for route in routes)):
            for headers in foreign_headers:
                assert _status(address, path, body, **headers) == 403


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_by_itself_in_a_browser(tmp_path: Path) -> None:
    """From an empty folder: example pictures, Learn, the loss, the table; an occupied word is
    refused; what takes away asks first.
    """
    with _served(tmp_path) as address, page(address, height=1800) as opened:
        opened.click("#continual_lora_example")
        opened.wait_for_function(
            "document.querySelector('#continual_lora_noun input, #continual_lora_noun "
            "textarea').value === 'ball'"
        )
        opened.click("text=Captions, and settings for experts")
        wait_for_text(opened, "#continual_lora_captions", ".png", 30_000)
        type_beside(opened, "#continual_lora_captions", "0.png", "a photo of V1 in a garden")
        fill_settings(opened, steps=6, batch=2, rank=4, fisher_samples=4, preview_every=3)
        opened.click("#continual_lora_learn")
        wait_for_text(opened, "#continual_lora_status", "Learned V1 ball")
        wait_for_text(opened, "#continual_lora_concepts", "6 steps, 5 pictures")
        stack = stack_path(next(tmp_path.glob("*.safetensors")))
        assert "a photo of V1 in a garden" in str(read_records(stack))
        copies = (tmp_path / "continual-lora" / "copies").rglob("*")
        assert [p for p in copies if p.is_file() and p.name != "lock"] == []
        opened.fill("#continual_lora_noun input, #continual_lora_noun textarea", "box")
        opened.click("#continual_lora_learn")
        wait_for_text(opened, "#continual_lora_status", "is already taken")
        opened.screenshot(path=str(tmp_path / "tab.png"))
        asks_first(opened, stack)
        opened.reload()
        wait_for_text(opened, "#continual_lora_concepts", "6 steps, 5 pictures")
        with urllib.request.urlopen(f"{address}/config") as answer:
            assert json.load(answer)["version"] == gradio.__version__


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_strangers_stack_runs_nothing_in_a_browser(checkpoint: Path, pictures: Path) -> None:
    """Its noun is HTML and Markdown that would set a variable of the page's; every view of it is
    opened.
    """
    noun = '<img src=x onerror="window.pwned=1">![](http://127.0.0.1/x)'
    quick = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)
    pipeline.learn_concept(LearnRequest(checkpoint, pictures, "V1", noun, quick, device="cpu"))
    with _served(checkpoint.parent) as address, page(address, height=1800) as opened:
        wait_for_text(opened, "#continual_lora_concepts", "<img src=x")
        opened.click("text=History of the stack")
        wait_for_text(opened, "#continual_lora_history", "<img src=x")
        for button in ("undo", "forget"):
            opened.click(f"#continual_lora_{button}")
            wait_for_text(opened, "#continual_lora_question", "<img src=x")
            opened.click("#continual_lora_no")
        opened.click("#continual_lora_export")
        wait_for_text(opened, "#continual_lora_status", "<img src=x")
        opened.click("#continual_lora_undo")
        opened.click("#continual_lora_yes")
        wait_for_text(opened, "#continual_lora_status", "Undone: learned V1 <img src=x")
        assert opened.evaluate("window.pwned") is None
        images = 'img[src=x], img[src="http://127.0.0.1/x"]'
        assert opened.evaluate(f"document.querySelectorAll('{images}').length") == 0


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while not _answers(address):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
        return True
    except OSError:
        return False
