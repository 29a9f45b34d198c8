"""The tab: what a click asks for, what is shown, and the whole path in a browser with `continual-lora ui`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, SAID, page, type_beside
from server import free_port

gradio = pytest.importorskip("gradio")

from comfy_continual_lora import pipeline, store  # noqa: E402
from comfy_continual_lora.settings import LearnSettings  # noqa: E402
from comfy_continual_lora.webui import tab  # noqa: E402
from comfy_continual_lora.webui.environment import REQUIREMENTS  # noqa: E402
from comfy_continual_lora.webui.job import Job  # noqa: E402

ROOT = Path(__file__).parents[1]


def test_the_environment_asks_for_what_the_package_does() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert declared
    assert tuple(re.findall(r'"(.+?)"', declared[1])) == REQUIREMENTS


def test_widgets_become_the_settings_that_differ() -> None:
    names = ("method", "steps", "flip", "rate", "checkpointing", "seed")
    assert tab.settings_of(LearnSettings, names, ("lora", 0, "auto", 0, False, 0)) == {"method": "lora"}
    assert tab.settings_of(LearnSettings, names, (LearnSettings().method, 40.0, "no", 0.001, True, 3.0)) == {
        "steps": 40, "flip": False, "rate": 0.001, "checkpointing": True, "seed": 3,
    }  # fmt: skip


def test_the_same_pictures_are_the_same_request(pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.iterdir())
    first = tab.keep_pictures(files, ["a red one", ""], tmp_path / "kept")
    assert tab.keep_pictures(files, ["a red one", ""], tmp_path / "kept") == first
    assert tab.keep_pictures(files, [], tmp_path / "kept") != first
    assert first[0].with_suffix(".txt").read_text() == "a red one"
    assert not first[1].with_suffix(".txt").exists()
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in files]


def test_the_table_reads_a_stack_without_torch(checkpoint: Path, pictures: Path) -> None:
    quick = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)
    pipeline.learn_concept(pipeline.LearnRequest(checkpoint, pictures, "V1", "<ball>", quick, device="cpu"))
    stack = tab.stack_file(checkpoint)
    assert stack == store.stack_path(checkpoint)
    shown = tab.table(tab.concepts_of(stack), {"V1 <ball>": 0.5})
    assert "&lt;ball&gt;" in shown
    assert "50 %" in shown
    assert tab.concepts_of(stack.with_name("none")) == []
    stack.write_bytes(stack.read_bytes()[:100])
    with pytest.raises(ValueError, match="can't be read as a concept stack"):
        tab.concepts_of(stack)
    with pytest.raises(ValueError, match="only letters"):
        tab.stack_file(checkpoint, "../up")


def test_captions_are_read_whatever_columns_there_are() -> None:
    assert tab.typed([["0.png", "a ball", "more"], ["1.png", ""]]) == {"0.png": "a ball", "1.png": ""}
    assert tab.typed([[]]) == {}  # gradio 3 after the pictures were cleared


def test_every_state_of_a_job_is_told() -> None:
    job = Job(1, [("learn", {})])
    assert tab.status(None) == "Ready."
    assert "Starting" in tab.status(job)
    job.progress = {"stage": "learn", "step": 3, "steps": 9, "loss": 0.125, "seconds_left": 61.0}
    assert tab.status(job) == "**learn** step 3 of 9, loss 0.1250, 1:01 left"
    job.state = "stopping"
    assert "stopping after this step" in tab.status(job)
    job.state, job.message = "stopped", "at step 4"
    assert "kept" in tab.status(job)
    job.state, job.message = "failed", "no room"
    assert tab.status(job) == "**learn failed.** no room"
    job.state, job.results = "done", {"learn": {"token": "V1", "noun": "ball"}, "export": {"lora": "/x/a-1.safetensors", "triggers": ["V1 ball"]}}
    assert "a photo of a V1 ball* `<lora:a-1:1>`" in tab.status(job)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_by_itself_in_a_browser(tmp_path: Path) -> None:
    """From an empty folder: example pictures, Learn, the loss, the table; an occupied word is refused in words; undo."""
    port = free_port()
    command = [sys.executable, "-m", "comfy_continual_lora", "ui", "--models", str(tmp_path), "--port", str(port), "--no-browser"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, server, tmp_path / "log")
            with page(address, height=1500) as opened:
                opened.click("#continual_lora_example")
                opened.wait_for_function("document.querySelector('#continual_lora_noun input, #continual_lora_noun textarea').value === 'ball'")
                opened.click("text=Captions, and settings for experts")
                opened.wait_for_function(SAID, arg=["#continual_lora_captions", ".png"])
                type_beside(opened, "#continual_lora_captions", "0.png", "a photo of V1 in a garden")
                for name, value in (("steps", 40), ("batch", 2), ("rank", 4), ("fisher_samples", 4), ("preview_every", 20)):
                    opened.fill(f"#continual_lora_{name} input", str(value))
                opened.click("#continual_lora_learn")
                _expect(opened, "#continual_lora_status", "Learned V1 ball")
                _expect(opened, "#continual_lora_concepts", "40 steps, 5 pictures")
                assert [file.read_text() for file in tmp_path.rglob("pictures/*/*.txt")] == ["a photo of V1 in a garden"]
                opened.fill("#continual_lora_noun input, #continual_lora_noun textarea", "box")
                opened.click("#continual_lora_learn")
                _expect(opened, "#continual_lora_status", "is taken")
                opened.screenshot(path=str(tmp_path / "tab.png"))
                opened.click("text=Undo the newest")
                _expect(opened, "#continual_lora_concepts", "No concept learned yet")
            with urllib.request.urlopen(f"{address}/config") as answer:
                assert json.load(answer)["version"] == gradio.__version__
        finally:
            server.terminate()


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


def _expect(opened: Any, where: str, text: str) -> None:
    opened.wait_for_function(SAID, arg=[where, text], timeout=300_000)
