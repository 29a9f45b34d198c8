"""The tab's host in a web UI, with stand-ins for the web UI's own modules."""

from __future__ import annotations

import importlib
import json
import logging
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("gradio")

from comfy_continual_lora.files import HOST, PRESET, WORDS
from comfy_continual_lora.hostareas import warn
from comfy_continual_lora.webui.job import Job

A1111, APART = (f"comfy_continual_lora.webui.{name}" for name in ("a1111", "apart"))


class FakeInitialModel:
    """What Forge and Neo have in place of a model that is not loaded."""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web UI without a model, whose checkpoints lie where `disk` says."""
    web = ModuleType("modules")
    disk = ["a.concepts.safetensors", "a.safetensors"]
    state = SimpleNamespace(begin=lambda job: None, end=lambda: None, request_restart=lambda: None)
    models = SimpleNamespace(
        FakeInitialModel=FakeInitialModel,
        model_data=SimpleNamespace(sd_model=FakeInitialModel()),
        checkpoints_list={},
        checkpoint_aliases={},
        unload_model_weights=lambda: did.append("unload"),
        send_model_to_device=lambda model: did.append("send"),
    )

    def list_models() -> None:
        for listed in (models.checkpoints_list, models.checkpoint_aliases):
            listed.clear()
            listed.update({name: SimpleNamespace(name=name, filename=name) for name in disk})

    did: list[str] = []
    models.list_models = list_models
    list_models()
    parts: dict[str, Any] = {
        "call_queue": SimpleNamespace(queue_lock=threading.Lock()),
        "processing": SimpleNamespace(
            StableDiffusionProcessingTxt2Img=SimpleNamespace(
                cached_c=["c", 1, 2], cached_uc=["u", 1]
            )
        ),
        "paths": SimpleNamespace(script_path="/webui", models_path="/data/models"),
        "sd_models": models,
        "shared": SimpleNamespace(state=state, sd_model=None, cmd_opts=SimpleNamespace()),
    }
    for name, part in parts.items():
        setattr(web, name, part)
    monkeypatch.setitem(sys.modules, "modules", web)
    parser = SimpleNamespace(SdConditioning=list, get_learned_conditioning=list)
    monkeypatch.setitem(sys.modules, "modules.prompt_parser", parser)
    yield SimpleNamespace(**parts, did=did, disk=disk)
    for name in (A1111, APART):  # they hold these stand-ins
        sys.modules.pop(name, None)


@pytest.fixture
def host(modules: Any, tmp_path: Path) -> Any:
    return importlib.import_module(A1111).WebuiHost(tmp_path / "extensions" / "continual-lora")


def _exported() -> Job:
    job = Job(1, [("export", {})])
    job.results = {"export": {}}
    return job


def test_a_placeholder_is_no_model(
    host: Any, modules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), host.around(_exported()):
        pass
    host.ended(_exported())
    assert not caplog.records
    assert modules.did == []


def test_prompts_are_encoded_again_with_new_words(host: Any, modules: Any) -> None:
    """Even if no model is loaded when a job ends: that of Forge and Neo has made room for the job."""
    processing = modules.processing.StableDiffusionProcessingTxt2Img
    host.ended(_exported())
    assert (processing.cached_c, processing.cached_uc) == ([None] * 3, [None] * 2)


def test_the_model_in_use_gets_new_words(
    host: Any, modules: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the engine that reads its prompts, or AUTOMATIC1111's module; an Anima in Neo takes none."""
    loaded: list[str] = []

    def database(name: str) -> Any:
        return SimpleNamespace(load_textual_inversion_embeddings=lambda **_: loaded.append(name))

    models = modules.sd_models.model_data
    with caplog.at_level(logging.ERROR):
        models.sd_model = SimpleNamespace(text_processing_engine_anima=object())
        host.ended(_exported())
        models.sd_model.text_processing_engine_l = SimpleNamespace(embeddings=database("clip_l"))
        host.ended(_exported())
        hijack = SimpleNamespace(model_hijack=SimpleNamespace(embedding_db=database("hijack")))
        monkeypatch.setitem(sys.modules, "modules.sd_hijack", hijack)
        models.sd_model = object()
        host.ended(_exported())
    assert not caplog.records
    assert loaded == ["clip_l", "hijack"]


def test_the_worker_knows_the_web_uis_folders(host: Any) -> None:
    assert host.runner.environment == {HOST: os.pathsep.join(("/webui", "/data/models"))}


def test_the_worker_knows_the_folders_of_flags_and_of_the_user(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags are Forge Neo's, whose --forge-ref-comfy-home sets them too."""
    monkeypatch.setenv(HOST, "/mine")
    modules.shared.cmd_opts = SimpleNamespace(
        vae_dirs=["/far/vae"], text_encoder_dirs=["/far/clip"]
    )
    host = importlib.import_module(A1111).WebuiHost(tmp_path / "extensions" / "continual-lora")
    told = host.runner.environment[HOST].split(os.pathsep)
    assert told == ["/webui", "/data/models", "/far/clip", "/far/vae", "/mine"]


@pytest.mark.parametrize("preset", ["sd1", "anima"])
def test_the_words_in_use_are_those_of_the_loras_that_are_loaded(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preset: str
) -> None:
    path = tmp_path / "lora.safetensors"
    words = {"V1": "ball", "V2": "fish"}
    save_file({"x": torch.zeros(1)}, path, {WORDS: json.dumps(words), PRESET: preset})
    used = SimpleNamespace(network_on_disk=SimpleNamespace(filename=str(path)))
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(loaded_networks=[used]))
    assert importlib.import_module(APART).words_in_use() == (words, preset)


@pytest.mark.parametrize("forge", [False, True])
def test_a_loaded_model_makes_room_and_the_forge_family_reloads_its_own(
    host: Any, modules: Any, forge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forge:
        monkeypatch.setitem(sys.modules, "modules_forge", ModuleType("modules_forge"))
    else:
        del modules.sd_models.FakeInitialModel
    modules.sd_models.model_data.sd_model = object()
    with host.around(_exported()):
        assert modules.did == ["unload"]
    assert modules.did == (["unload"] if forge else ["unload", "send"])


def test_reforge_unloads_through_its_memory_management(
    host: Any, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    management = SimpleNamespace(unload_all_models=lambda: modules.did.append("all"))
    monkeypatch.setitem(sys.modules, "ldm_patched.modules.model_management", management)
    monkeypatch.setitem(sys.modules, "modules_forge", ModuleType("modules_forge"))
    modules.sd_models.model_data.sd_model = object()
    with host.around(_exported()):
        pass
    assert modules.did == ["all"]


def test_stacks_are_not_among_the_web_uis_checkpoints(host: Any, modules: Any) -> None:
    models = modules.sd_models
    assert list(models.checkpoints_list) == list(models.checkpoint_aliases) == ["a.safetensors"]
    modules.disk += ["b.safetensors", "b.mine.concepts.safetensors"]
    host.refresh()
    assert list(models.checkpoints_list) == ["a.safetensors", "b.safetensors"]
    assert list(host.checkpoints()) == ["a.safetensors", "b.safetensors"]


def test_what_a_failed_generation_left_is_undone_after_reload_ui(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reload UI runs the extension's script again; the web UI's model stays, changed as it is."""
    callbacks = dict.fromkeys(("on_ui_settings", "on_ui_tabs", "on_app_started"), lambda _: None)
    web = sys.modules["modules"]
    monkeypatch.setattr(web, "script_callbacks", SimpleNamespace(**callbacks), raising=False)
    monkeypatch.setattr(web, "scripts", SimpleNamespace(Script=object), raising=False)
    modules.shared.opts = None
    script = Path(__file__).parents[1] / "a1111_extension" / "scripts" / "continual_lora.py"
    before, after = (runpy.run_path(str(script))["SeveralLearnedThings"]() for _ in range(2))
    monkeypatch.setattr(
        sys.modules[APART], "words_in_use", lambda: ({"V1": "ball", "V2": "mug"}, "sd1")
    )
    unet = torch.nn.Sequential(torch.nn.Identity())
    model = SimpleNamespace(
        get_learned_conditioning=list,
        cond_stage_model=SimpleNamespace(tokenize_line=None),
        model=SimpleNamespace(diffusion_model=unet),
    )
    batch = SimpleNamespace(
        prompts=["a V1 ball and a V2 mug"],
        negative_prompts=[],
        extra_generation_params={},
        sd_model=model,
    )
    before.process_batch(batch)
    before.process_before_every_sampling(batch)
    assert "forward" in unet.__dict__
    batch.prompts = ["a dog"]
    after.process_batch(batch)
    assert "forward" not in unet.__dict__


def test_checkpoints_are_listed_while_the_web_ui_looks_for_them(host: Any, modules: Any) -> None:
    """In another thread, which adds one between any two of those that are read."""
    listed = modules.sd_models.checkpoints_list

    class Growing:
        @property
        def name(self) -> str:
            listed[str(len(listed))] = self
            return "a.safetensors"

        filename = "a.safetensors"

    listed["a.safetensors"] = Growing()
    assert list(host.checkpoints()) == ["a.safetensors"]


def test_the_page_opens_with_the_checkpoint_chosen_in_the_web_ui(host: Any, modules: Any) -> None:
    """The Forge family still has the one before, until it draws."""
    models, title = modules.sd_models, "b.safetensors [0123456789]"
    options: dict[str, Any] = {"sd_model_checkpoint": title}
    modules.shared.opts = SimpleNamespace(data=options)
    modules.disk.append("b.safetensors")
    host.refresh()
    models.checkpoint_aliases[title] = models.checkpoints_list["b.safetensors"]
    models.model_data.sd_model = SimpleNamespace(
        sd_checkpoint_info=models.checkpoints_list["a.safetensors"]
    )
    assert host.preferred() == ("b.safetensors", "")
    for gone in ("gone.safetensors", None):
        options["sd_model_checkpoint"] = gone
        assert host.preferred() == ("a.safetensors", "")


def test_interrupt_starts_none_of_those_that_wait(host: Any, modules: Any) -> None:
    job = Job(1, [("learn", {"token": "V1"})])
    host.runner.job = job
    host.waiting = [([("learn", {"token": "V2"})], None)]
    modules.shared.state.interrupted = False
    host.follow(job)
    assert len(host.waiting) == 1
    modules.shared.state.interrupted = True
    host.follow(job)
    assert host.waiting == []
    assert job.state == "stopped"


def test_a_warning_is_shown_by_a_web_ui_that_logs_errors_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    warn("V1 and V2 are drawn mixed")
    assert "V1 and V2 are drawn mixed" in caplog.text
