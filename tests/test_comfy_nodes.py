"""The nodes' declarations, without ComfyUI: a stand-in for the few names of its API they are
declared with.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers_messages import marked_names
from helpers_store import make_stack
from safetensors.torch import save_file

from comfy_continual_lora import concepts, listing, store
from comfy_continual_lora.errors import ConceptImagesError, SettingError, StackError
from comfy_continual_lora.fields import check_field, from_widget
from comfy_continual_lora.files import cache_folder
from comfy_continual_lora.inventory import inventory
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import (
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    TrainSettings,
)
from comfy_continual_lora.stack import CheckpointInfo, ConceptStack
from comfy_continual_lora.versions import in_use

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
CORE = {  # core nodes the workflows use: outputs
    "CheckpointLoaderSimple": 3,
    "UNETLoader": 1,
    "CLIPLoader": 1,
    "VAELoader": 1,
    "CLIPTextEncode": 1,
    "EmptyLatentImage": 1,
    "KSampler": 1,
    "VAEDecode": 1,
    "PreviewImage": 0,
    "PreviewAny": 0,
    "MarkdownNote": 0,
    "ConditioningSetArea": 1,
    "ConditioningCombine": 1,
}


SETTINGS_OF = {
    "LearnConcept": LearnSettings,
    "Consolidate": TrainSettings,
    "ComputeScores": ScoreSettings,
    "EvaluateRetention": EvaluateSettings,
    "ConsolidateInClosedForm": SolveSettings,
    "SelectConcepts": SolveSettings,
    "ForgetConcept": SolveSettings,
    "MergeStacks": SolveSettings,
}


class _Port:
    def __init__(self, io_type: str, id: str | None, rest: dict[str, Any]) -> None:
        self.io_type, self.id, self.rest = io_type, id, rest


def _type(io_type: str) -> Any:
    made = types.SimpleNamespace()
    made.Input = lambda id, **rest: _Port(io_type, id, rest)
    made.Output = lambda id=None, **rest: _Port(io_type, id, rest)
    return made


def _several_types(port: _Port, more: list[Any]) -> _Port:
    """A widget that numbers can be connected to as well."""
    kinds = [port.io_type, *(one.Output().io_type for one in more)]
    return _Port(",".join(kinds), port.id, {**port.rest, "widgetType": port.io_type})


def _stand_in(schema_fields: list[str]) -> dict[str, types.ModuleType]:
    io: Any = types.ModuleType("io")
    io.Schema = dataclasses.make_dataclass(
        "Schema", [(name, Any, dataclasses.field(default=None)) for name in schema_fields]
    )
    io.ComfyNode, io.NodeOutput, io.Custom = object, lambda *values: values, _type
    for name in (
        "Model",
        "Clip",
        "Image",
        "Mask",
        "Latent",
        "String",
        "Int",
        "Float",
        "Boolean",
        "Combo",
        "LoraModel",
    ):
        setattr(io, name, _type(name.upper()))
    io.MultiType = types.SimpleNamespace(Input=_several_types)
    io.Hidden = types.SimpleNamespace(
        prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO", unique_id="UNIQUE_ID"
    )
    latest: Any = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    memory, utils, folders = (
        types.ModuleType(name) for name in ("comfy.model_management", "comfy.utils", "folder_paths")
    )
    comfy: Any = types.ModuleType("comfy")
    comfy.model_management, comfy.utils = memory, utils
    utils.ProgressBar = object  # type: ignore[attr-defined]
    listed = [
        "mini-sd.safetensors",
        "mini-sd.concepts.safetensors",
        "mini-sd.family.concepts.safetensors",
    ]
    folders.get_filename_list = lambda kind: [] if kind == "diffusion_models" else listed  # type: ignore[attr-defined]
    names = {
        "comfy_api": types.ModuleType("comfy_api"),
        "comfy_api.latest": latest,
        "comfy": comfy,
        "folder_paths": folders,
    }
    return {**names, "comfy.model_management": memory, "comfy.utils": utils}


NEW = [
    "node_id",
    "display_name",
    "category",
    "inputs",
    "outputs",
    "description",
    "search_aliases",
    "is_input_list",
    "is_output_node",
    "hidden",
]


@pytest.fixture(
    params=[NEW, [name for name in NEW if name != "search_aliases"]], ids=["new", "old"]
)
def nodes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """comfy_nodes.nodes, imported against a newer and an older ComfyUI."""
    for name, module in _stand_in(request.param).items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("comfy_continual_lora.comfy_nodes.nodes")
    package = sys.modules["comfy_continual_lora.comfy_nodes"]
    for name in [n for n in sys.modules if n.startswith(f"{package.__name__}.")]:
        del sys.modules[name]
        delattr(package, name.rpartition(".")[2])


def test_ids_names_and_help(nodes: Any) -> None:
    schemas = _schemas(nodes)
    assert len({s.node_id for s in schemas}) == len(schemas)
    for s in schemas:
        assert s.node_id.startswith("ContinualLora_")
        assert s.category == "Continual LoRA"
        assert s.description
        assert (REPOSITORY / "web" / "docs" / f"{s.node_id}.md").exists()
        for port in s.inputs:
            assert (
                port.io_type in ("CONCEPT_STACK", "MODEL", "CLIP", "IMAGE", "MASK")
                or port.rest["tooltip"]
            ), f"{s.node_id}.{port.id} has no tooltip"


def test_with_defaults_a_user_sets_four_things(nodes: Any) -> None:
    schema = nodes.LearnConcept.define_schema()
    must = [port.id for port in schema.inputs if not port.rest.get("optional")]
    assert must == ["stack", "images", "token", "noun"]


def test_our_own_files_are_not_offered_as_checkpoints(nodes: Any) -> None:
    first = nodes.LoadConceptStack.define_schema().inputs[0]
    assert first.rest["options"] == ["mini-sd.safetensors"]


@pytest.fixture
def models(nodes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for each kind of ComfyUI's files, which the host lists as ComfyUI does."""

    def listed(kind: str) -> list[str]:
        folder = tmp_path / kind
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))

    def full_path(kind: str, name: str) -> str | None:
        path = tmp_path / kind / name
        return str(path) if path.is_file() else None

    folders: Any = sys.modules["folder_paths"]
    monkeypatch.setattr(folders, "get_filename_list", listed)
    monkeypatch.setattr(folders, "get_full_path", full_path, raising=False)
    for kind in ("checkpoints", "diffusion_models"):
        (tmp_path / kind).mkdir()
    return tmp_path


ANIMA = {
    "blocks.0.cross_attn.k_proj.weight": torch.zeros(1),
    "llm_adapter.out_proj.weight": torch.zeros(1),
}


def test_nets_of_anima_are_listed_beside_checkpoints_of_the_same_name(
    nodes: Any, models: Path
) -> None:
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    checkpoint, net = (
        models / kind / "a.safetensors" for kind in ("checkpoints", "diffusion_models")
    )
    net.with_name("sub").mkdir()
    inside = net.with_name("sub") / "b.safetensors"
    stack = net.with_name("a.family.concepts.safetensors")
    for path in (checkpoint, net):
        save_file(ANIMA, path)
    store.save_stack(make_stack(1), stack)
    save_file({f"net.{name}": one for name, one in ANIMA.items()}, inside)
    names = ["a.safetensors", "a.safetensors [diffusion_models]"]
    names.append("sub/b.safetensors [diffusion_models]")
    assert host.checkpoints() == names
    assert [host.checkpoint_path(name) for name in names] == [checkpoint, net, inside]
    assert host.stack_names() == ["family"]
    loaded, _ = nodes.LoadConceptStack.execute(names[1], stack="family")
    assert (loaded.checkpoint, loaded.file) == (net, stack)
    inside.unlink()
    assert host.checkpoints() == names[:2]
    with pytest.raises(StackError, match="no longer in ComfyUI's diffusion_models folders"):
        host.checkpoint_path(names[2])


def test_other_files_among_diffusion_models_are_left_out(
    nodes: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file is is asked once, until it changes."""
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    folder = models / "diffusion_models"
    (folder / "text.safetensors").write_text("<html>")
    (folder / "empty.safetensors").touch()
    (folder / "long.safetensors").write_bytes(b"\xff" * 64)
    (folder / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (folder / "folder.safetensors").mkdir()
    (folder / "dangling.safetensors").symlink_to(folder / "gone")
    save_file({"blocks.0.weight": torch.zeros(1)}, folder / "other.safetensors")
    save_file(ANIMA, folder / "anima.gguf")
    assert host.checkpoints() == []
    asked: list[Path] = []
    names_of = listing.weight_names
    monkeypatch.setattr(listing, "weight_names", lambda path: asked.append(path) or names_of(path))
    assert host.checkpoints() == []
    assert not asked
    save_file(ANIMA, folder / "other.safetensors")
    assert host.checkpoints() == ["other.safetensors [diffusion_models]"]
    assert asked == [folder / "other.safetensors"]


def test_a_checkpoints_own_stack_is_not_listed_as_one_that_another_names(
    nodes: Any, models: Path
) -> None:
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    folder = models / "checkpoints"
    for stem in ("sd", "sd.v2.1"):
        (folder / f"{stem}.safetensors").touch()
        store.save_stack(make_stack(1), folder / f"{stem}.concepts.safetensors")
    store.save_stack(make_stack(1), folder / "sd.v2.concepts.safetensors")
    store.save_stack(make_stack(1), folder / "sd.v2.1.dogs.concepts.safetensors")
    assert host.stack_names() == ["dogs", "v2"]
    (folder / "sd.v2.safetensors").touch()
    assert host.stack_names() == ["dogs"]


def test_a_stack_without_its_checkpoint_is_named_whatever_is_beside_it(
    nodes: Any, tmp_path: Path
) -> None:
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    for name in ("old", "kept"):
        for count in (1, 2):  # so that it has a history
            store.save_stack(make_stack(count), tmp_path / f"{name}.concepts.safetensors")
        (tmp_path / f"{name}.concepts.cache").mkdir()
    store.save_stack(make_stack(1), tmp_path / "kept.dogs.concepts.safetensors")
    (tmp_path / "kept.safetensors").touch()
    assert host.stacks_without_checkpoint(tmp_path) == ["old.concepts.safetensors"]


def test_existing_stacks_are_listed_and_old_workflows_name_theirs(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = nodes.LoadConceptStack
    stack = node.define_schema().inputs[2]
    assert (stack.rest["options"], stack.rest["default"]) == (["own", "new", "family"], "own")
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    monkeypatch.setattr(host, "checkpoint_path", lambda name: tmp_path / name)
    (tmp_path / "mini-sd.safetensors").touch()
    for given, file in (
        ({}, "mini-sd.concepts.safetensors"),
        ({"stack_name": "old"}, "mini-sd.old.concepts.safetensors"),  # before there was a list
        ({"stack_name": "fresh", "stack": "new"}, "mini-sd.fresh.concepts.safetensors"),
        ({"stack_name": "fresh", "stack": "family"}, "mini-sd.family.concepts.safetensors"),
    ):
        loaded, _ = node.execute("mini-sd.safetensors", **given)
        assert loaded.file == tmp_path / file
    with pytest.raises(StackError, match=r"A new stack needs a name\. Write one into stack_name"):
        node.execute("mini-sd.safetensors", stack="new")


def test_every_widget_reaches_its_setting(nodes: Any) -> None:
    """The value of each widget, set to something else than its default, arrives in the settings,
    and the defaults are the settings' own.
    """
    settings_from = importlib.import_module("comfy_continual_lora.comfy_nodes.schema").settings_from
    for name, settings in SETTINGS_OF.items():
        node = getattr(nodes, name)
        names = {f.name for f in dataclasses.fields(settings)}
        ports = {port.id: port for port in node.define_schema().inputs if port.id in names}
        assert ports
        if settings is SolveSettings:
            assert ports.keys() == names
        defaults = {name: port.rest["default"] for name, port in ports.items()}
        assert settings_from(settings, defaults) == settings()
        for name, port in ports.items():
            if port.io_type == "BOOLEAN":
                changed = settings_from(settings, {name: not defaults[name]})
                assert getattr(changed, name) is not defaults[name]
                continue
            if "options" in port.rest:
                other = next(o for o in port.rest["options"] if o != port.rest["default"])
            elif port.io_type == "STRING":
                other = "a V1 ball"
            else:
                other = 1 if defaults[name] == "auto" else defaults[name] + 1
            value = getattr(settings_from(settings, {name: other}), name)
            assert value == {"yes": True, "no": False}.get(other, other)


def test_what_the_checkpoint_decides_says_auto_and_takes_numbers(nodes: Any) -> None:
    """Workflows saved when these widgets were numbers hold 0 for auto; PrimitiveFloat and other
    nodes can still be connected.
    """
    ports = {port.id: port for port in nodes.LearnConcept.define_schema().inputs}
    assert ports["rate"].io_type == "STRING,FLOAT,INT"
    assert ports["rank"].io_type == "STRING,INT"
    for name in ("steps", "rank", "rate", "vectors", "size", "ewc_strength"):
        assert ports[name].rest["default"] == "auto"
        assert "Auto: what suits the checkpoint" in ports[name].rest["tooltip"]
    of = importlib.import_module("comfy_continual_lora.comfy_nodes.schema").settings_from
    for nothing in (0, 0.0, "0", "0.000000", "", "auto", " Auto "):
        assert of(LearnSettings, {"steps": nothing, "rate": nothing}) == LearnSettings()
    typed = of(LearnSettings, {"steps": " 300 ", "rate": "1.5e-4", "rank": 8, "size": 512.0})
    assert typed == LearnSettings(steps=300, rate=1.5e-4, rank=8, size=512)
    for wrong in ("many", "nan", "inf", "3.5"):
        with pytest.raises(SettingError, match=r"`?steps`? is"):
            of(LearnSettings, {"steps": wrong}).check()


def test_learn_shows_five_widgets(nodes: Any) -> None:
    ports = nodes.LearnConcept.define_schema().inputs
    widgets = [port for port in ports if "default" in port.rest]
    shown = [port.id for port in widgets if not (port.rest.get("extra_dict") or {})]
    assert shown == ["token", "noun", "steps", "seed", "preview_every"]


def test_widgets_stay_where_saved_workflows_have_them(nodes: Any) -> None:
    """A saved workflow lists values by position, so new widgets come last."""
    before = {
        "LearnConcept": "token noun method steps rank rate seed preview_every token_rate batch size "
        "fit flip adapter ewc_strength retention_weight dsc_steps fisher_samples precision "
        "checkpointing if_word_exists vectors",
        "Consolidate": "dsc_steps dsc_rate seed rate batch size fit flip dsc_a1 dsc_a2 dsc_b1 dsc_b2 "
        "dsc_redraw ewc_strength retention_weight precision fisher_samples",
        "LoadConceptStack": "checkpoint stack_name",
        "ComputeScores": "trials seed stages weighting rows size fit",
        "EvaluateRetention": "pictures steps seed guidance trials size clip_folder",
        "ExportConcepts": "remove_superseded",
        "ApplyConcepts": "strength version mixed",
    }
    for name, widgets in before.items():
        ports = getattr(nodes, name).define_schema().inputs
        kinds = ("STRING", "INT", "FLOAT", "COMBO", "BOOLEAN")
        ids = [
            port.id
            for port in ports
            if port.io_type.split(",")[0] in kinds and not port.rest.get("force_input")
        ]
        assert ids[: len(widgets.split())] == widgets.split()


def test_masks_of_the_input_are_saved_unless_they_stand_for_none(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LoadImage's mask is 64 x 64 zeros for a picture without alpha; inverted it is ones."""
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    temporary = {"get_temp_directory": lambda: str(tmp_path)}
    monkeypatch.setattr(host, "folder_paths", types.SimpleNamespace(**temporary))
    half = torch.zeros(1, 64, 64)
    half[:, 20:] = 1
    masks = [torch.zeros(1, 64, 64), torch.ones(64, 64), half, torch.ones(1, 48, 32)]
    with host.saved_pictures([torch.rand(4, 48, 32, 3)], ["a ball"], masks) as files:
        found = inventory(files)
        assert found.summary() == "4 pictures, 4 captions (.txt), 2 masks"
        assert [bool(picture.mask) for picture in found.pictures] == [False, False, True, True]
        assert [file.name for file in files] == [f"picture {number}" for number in range(1, 5)]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ConceptImagesError, match=r"In the input, picture 3 has .* not finite"):
            host.save_pictures([torch.zeros(2, 48, 32, 3), torch.full((1, 48, 32, 3), wrong)])
        with pytest.raises(ConceptImagesError, match="the mask of picture 2 has"):
            host.save_pictures(
                [torch.zeros(2, 48, 32, 3)], (), [torch.zeros(48, 32), torch.full((48, 32), wrong)]
            )
    with pytest.raises(ConceptImagesError, match=r"^The caption of picture 2 contains '\\x00'"):
        host.save_pictures([torch.zeros(2, 48, 32, 3)], ["one", "\0"])


def test_the_masks_input_says_which_way_white_means(nodes: Any) -> None:
    masks = next(one for one in nodes.LearnConcept.define_schema().inputs if one.id == "masks")
    assert "white is learned from" in masks.rest["tooltip"]
    assert "InvertMask" in masks.rest["tooltip"]


def test_a_selection_is_not_merged(nodes: Any) -> None:
    """Only files are merged, and what Select Concepts solved for has none."""
    handle = importlib.import_module("comfy_continual_lora.comfy_nodes.handle")
    stack = handle.StackHandle(Path("mini-sd.safetensors"), Path("mini-sd.concepts.safetensors"), 0)
    with pytest.raises(StackError, match="Connect the other's Load Concept Stack"):
        nodes.MergeStacks.execute(stack, dataclasses.replace(stack, selected=ConceptStack("")))


@pytest.mark.parametrize("name", ["ComputeScores", "EvaluateRetention", "SelectConcepts"])
def test_a_selection_is_for_drawing_and_exporting(nodes: Any, closed_stack: Any, name: str) -> None:
    """Elsewhere it would count for nothing: requests are about the whole stack."""
    selected = dataclasses.replace(closed_stack, selected=ConceptStack(""))
    given: dict[str, Any] = {"stack": selected, "tokens": "V1"}
    if name == "ComputeScores":
        given = {"stack": [selected], "images": [torch.zeros(1, 8, 8, 3)]}
    folders: Any = sys.modules["folder_paths"]
    folders.get_temp_directory = lambda: str(closed_stack.file.parent)
    with pytest.raises(StackError, match=r"works with whole stacks\. Connect Load Concept Stack"):
        getattr(nodes, name).execute(**given)


def test_a_selection_has_no_earlier_version(nodes: Any, closed_stack: Any) -> None:
    store.save_stack(make_stack(2), closed_stack.file)
    selected = dataclasses.replace(closed_stack, selected=make_stack(1))
    with pytest.raises(StackError, match="Set version to 0, or connect Load Concept Stack"):
        nodes.ApplyConcepts.execute(None, None, selected, 1.0, version=1)


def test_an_empty_list_for_a_widget_is_refused(nodes: Any, closed_stack: Any) -> None:
    pictures = [torch.zeros(1, 8, 8, 3)]
    with pytest.raises(SettingError, match="trials is an empty list"):
        nodes.ComputeScores.execute(images=pictures, stack=[closed_stack], trials=[])


def test_a_list_of_different_values_is_refused_where_one_is_taken(
    nodes: Any, closed_stack: Any
) -> None:
    """All but the first counted for nothing: of two stacks, one was scored with."""
    given = {"images": [torch.zeros(1, 8, 8, 3)], "stack": [closed_stack, closed_stack]}
    other = dataclasses.replace(closed_stack, count=1)
    for wrong in ({"trials": [8, 16]}, {"stack": [closed_stack, other]}):
        message = f"{next(iter(wrong))} is a list of 2 values that differ, and this node takes one"
        with pytest.raises(SettingError, match=message):
            nodes.ComputeScores.execute(**{**given, **wrong})
    schema = importlib.import_module("comfy_continual_lora.comfy_nodes.schema")
    same = schema.first_values({"stack": given["stack"], "trials": [8, 8]})
    assert same == {"stack": closed_stack, "trials": 8}


def test_what_is_no_stack_is_refused_in_words(nodes: Any) -> None:
    """ComfyUI's API takes any value in place of a wire, and nodes of any type give None."""
    checked = set()
    for node in nodes.NODES:
        wires = [one for one in node.define_schema().inputs if one.io_type == "CONCEPT_STACK"]
        given: dict[str, Any] = {one.id: None for one in wires}
        if wires and node.define_schema().is_input_list:
            given = {name: ["mini-sd"] for name in given} | {"images": []}
        if wires:
            with pytest.raises(StackError, match=r"^(stack|other) is .*which is no concept stack"):
                node.execute(**given)
            checked.add(node.__name__)
    assert len(nodes.NODES) - len(checked) == 3  # those that load, give examples and show areas


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "sd15.safetensors", r"^model is 'sd15.*', which is no MODEL\. Connect"),
        ("model", None, "^model is None, which is no MODEL"),
        ("clip", None, "^clip is None, which is no CLIP.* of Load CLIP"),  # a file without one
        ("clip", 3, "^clip is 3, which is no CLIP"),
        ("strength", None, "^strength is None, which is no number"),
        ("masks", 2, "^masks is 2, which holds no pixels"),
        ("masks", "left", "^masks is 'left', which holds no pixels"),
        ("masks", torch.zeros(2, 8, 8, 3), r"^masks is a tensor of shape \(2, 8, 8, 3\)"),
    ],
)
def test_apply_concepts_refuses_in_words_what_is_no_wire(
    nodes: Any, closed_stack: Any, name: str, value: Any, message: str
) -> None:
    """As `test_what_is_no_stack_is_refused_in_words`."""
    given = {
        "model": types.SimpleNamespace(model_options={}),
        "clip": types.SimpleNamespace(tokenizer=None),
        "stack": closed_stack,
        "strength": 0.0,
        name: value,
    }
    with pytest.raises((SettingError, ConceptImagesError), match=message):
        nodes.ApplyConcepts.execute(**given)


@pytest.mark.parametrize("latent", ["24", {}, {"samples": None}, None])
def test_concept_areas_refuses_in_words_what_is_no_wire(nodes: Any, latent: Any) -> None:
    model = types.SimpleNamespace(model_options={})
    with pytest.raises(SettingError, match=r"^latent is .*which is no LATENT"):
        nodes.ConceptAreas.execute(model=model, latent=latent)
    with pytest.raises(SettingError, match=r"^model is '4', which is no MODEL"):
        nodes.ConceptAreas.execute(model="4", latent={"samples": torch.zeros(1, 4, 8, 8)})


def test_what_is_no_text_is_refused_in_words(nodes: Any, closed_stack: Any) -> None:
    """A switch of any type with nothing behind it gives None."""
    for node in (nodes.ForgetConcept, nodes.UndoConcept):
        with pytest.raises(SettingError, match=r"^token is None, which is no text"):
            node.execute(stack=closed_stack, token=None)
    with pytest.raises(SettingError, match=r"^token is \[None\], which is no text"):
        nodes.LearnConcept.execute(stack=[closed_stack], images=[], token=[None], noun=["dog"])
    with pytest.raises(SettingError, match=r"^captions is \[None\], which is no text"):
        nodes.LearnConcept.execute(stack=[closed_stack], images=[], captions=[None])
    with pytest.raises(SettingError, match=r"^tokens is 1, which is no text"):
        nodes.SelectConcepts.execute(stack=closed_stack, tokens=1)


def test_what_is_no_picture_is_refused_in_words(nodes: Any) -> None:
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    picture = torch.zeros(1, 8, 8, 3)
    for images, masks, message in (
        (["a.png"], (), r"^images is 'a\.png', which holds no pixels"),
        ([picture, None], (), "^images is None, which"),
        ([picture], [None], "^masks is None, which"),
        ([picture], [picture], r"^masks is a tensor of shape \(1, 8, 8, 3\); a MASK is"),
        ([torch.zeros(1, 8, 8, 1)], (), r"^images is a tensor of shape \(1, 8, 8, 1\)"),
        ([picture[0]], (), r"^images is a tensor of shape \(8, 8, 3\)"),
    ):
        with pytest.raises(ConceptImagesError, match=message):
            host.save_pictures(images, (), masks)


def test_a_lora_that_was_written_again_is_imported_again(nodes: Any, models: Path) -> None:
    """ComfyUI runs a node again if its fingerprint differs from that of the last run."""
    (models / "loras").mkdir()
    lora = models / "loras" / "dog.safetensors"
    lora.touch()
    asked = nodes.ImportLora.fingerprint_inputs
    first = asked(lora="dog.safetensors", embedding="", stack=None, token="W1")
    assert asked(lora="dog.safetensors", embedding="", stack=None, token="W1") == first
    os.utime(lora, (1, 1))
    assert asked(lora="dog.safetensors", embedding="", stack=None, token="W1") != first
    assert asked(lora=None, embedding=None, stack=None) == ""


def test_a_wired_lora_that_was_written_again_is_imported_again(
    nodes: Any, models: Path, closed_stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI tells a fingerprint nothing of what comes by a wire."""
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    operations = importlib.import_module("comfy_continual_lora.operations").OPERATIONS
    (models / "loras").mkdir()
    lora = models / "loras" / "dog.safetensors"
    lora.touch()
    node, given = nodes.ImportLora, {"stack": None, "token": "W1", "embedding": ""}
    monkeypatch.setattr(host, "at_work", lambda: nullcontext(host.Reporter()))
    done = types.SimpleNamespace(summary=lambda: "Imported.")
    monkeypatch.setitem(operations, "import", lambda *_: done)
    before = node.fingerprint_inputs(lora=None, **given)
    rest = {"noun": "dog", "trigger": "", "strength": 1.0}
    node.execute(lora="dog.safetensors", **{**given, **rest, "stack": closed_stack})
    assert node.fingerprint_inputs(lora=None, **given) == before
    os.utime(lora, (1, 1))
    after = node.fingerprint_inputs(lora=None, **given)
    assert after != before
    assert node.fingerprint_inputs(lora=None, **given) == after


def test_a_stack_that_was_deleted_is_another_than_before_it_was_learned(
    nodes: Any, closed_stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI keeps what nodes made of every earlier state: queued again, Learn Concept did nothing,
    and its report said that the concept is stored.
    """
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    monkeypatch.setattr(host, "checkpoint_path", lambda _: closed_stack.checkpoint)
    closed_stack.checkpoint.touch()
    asked = nodes.LoadConceptStack.fingerprint_inputs
    empty = asked("none")
    assert asked("none") == empty
    store.save_stack(make_stack(1), closed_stack.file)
    learned = closed_stack.now()  # as Learn Concept does when it is done
    one = closed_stack.file.read_bytes(), closed_stack.file.stat().st_mtime_ns
    seen = [empty, asked("none")]
    assert asked("none") == seen[1]
    closed_stack.file.unlink()
    assert asked("none") not in seen
    seen.append(asked("none"))
    closed_stack.file.write_bytes(one[0])  # from a backup
    os.utime(closed_stack.file, ns=(one[1], one[1]))
    assert asked("none") not in seen
    assert learned.now() == learned


def test_a_version_beyond_the_end_is_refused(nodes: Any, closed_stack: Any) -> None:
    store.save_stack(make_stack(2), closed_stack.file)
    with pytest.raises(StackError, match=r"no version 3 of the stack none.* it holds 2 concepts"):
        nodes.ApplyConcepts.execute(None, None, closed_stack, 0.0, version=3)
    for version in (0, 1, 2):  # as far as a CLIP that is none
        with pytest.raises(AttributeError, match="tokenizer"):
            nodes.ApplyConcepts.execute(None, None, closed_stack.now(), 0.0, version, mixed=True)


@pytest.fixture
def closed_stack(nodes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stack of a checkpoint that is not there, in a host that computes on the CPU."""
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    for name in (
        "unload_all_models",
        "soft_empty_cache",
        "throw_exception_if_processing_interrupted",
    ):
        monkeypatch.setattr(host.model_management, name, lambda: None, raising=False)
    monkeypatch.setattr(host.model_management, "get_torch_device", lambda: "cpu", raising=False)
    handle = importlib.import_module("comfy_continual_lora.comfy_nodes.handle")
    return handle.StackHandle(
        tmp_path / "none.safetensors", tmp_path / "none.concepts.safetensors", 0
    )


def test_what_was_chosen_reaches_the_request(
    nodes: Any, closed_stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node hands the table's operation a request about its stack, with its widgets' values."""
    operations = importlib.import_module("comfy_continual_lora.operations").OPERATIONS
    requests_by_name: dict[str, Any] = {}

    def spy(name: str) -> Any:
        def run(request: Any, *_: Any) -> Any:
            assert isinstance(request, type_of[name])
            request.check()
            requests_by_name[name] = request
            raise StackError("far enough")

        return run

    type_of = {name: operation.request for name, operation in operations.items()}
    for name in type_of:
        monkeypatch.setitem(operations, name, spy(name))
    lists = {"stack": [closed_stack], "images": [_Picture()]}
    replace = {"if_word_exists": ["replace the newest"], "rank": [8], "flip": ["no"]}
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    monkeypatch.setattr(host, "save_pictures", lambda *_: [Path("a/0.png")])
    monkeypatch.setattr(host, "file_of", lambda _kind, name: Path(name))
    for node, given, name, expected in (
        (
            nodes.LearnConcept,
            {**lists, "token": [" V1 "], "noun": ["ball"], **replace},
            "learn",
            {"token": "V1", "noun": "ball", "replace": True},
        ),
        (nodes.Consolidate, {**lists, "dsc_steps": [7]}, "consolidate", {}),
        (nodes.ComputeScores, {**lists, "trials": [7]}, "scores", {}),
        (nodes.ConsolidateInClosedForm, {"stack": closed_stack, "energy": 0.9}, "closed_form", {}),
        (
            nodes.EvaluateRetention,
            {"stack": closed_stack, "clip_folder": "c", "pictures": 2},
            "evaluate",
            {"clip": Path("c")},
        ),
        (
            nodes.MergeStacks,
            {"stack": closed_stack, "other": closed_stack},
            "merge",
            {"other": closed_stack.file},
        ),
        (
            nodes.ImportLora,
            {
                "stack": closed_stack,
                "lora": "l",
                "token": "W1",
                "noun": "",
                "embedding": "e",
                "trigger": "",
                "strength": 0.5,
            },
            "import",
            {"lora": Path("l"), "embedding": Path("e"), "strength": 0.5},
        ),
        (nodes.StackHistory, {"stack": closed_stack, "restore": 3}, "restore", {"version": 3}),
        (nodes.StackHistory, {"stack": closed_stack, "keep": 0}, "history", {"keep": 0}),
        (nodes.StackHistory, {"stack": closed_stack}, "history", {"keep": None}),
    ):
        with pytest.raises(StackError, match="far enough"):
            node.execute(**given)
        request = requests_by_name[name]
        assert (request.checkpoint, request.stack) == (closed_stack.checkpoint, closed_stack.file)
        assert request.device == "cpu"
        assert {field: getattr(request, field) for field in expected} == expected
    assert requests_by_name["learn"].settings == LearnSettings(rank=8, flip=False)
    assert requests_by_name["consolidate"].settings == TrainSettings(dsc_steps=7)
    assert requests_by_name["scores"].settings == ScoreSettings(trials=7)
    assert requests_by_name["closed_form"].settings == SolveSettings(energy=0.9)
    assert requests_by_name["evaluate"].settings == EvaluateSettings(pictures=2)


class _Picture(list):
    """Stands for an IMAGE."""


def test_history_goes_back_once_however_often_it_is_queued(nodes: Any, closed_stack: Any) -> None:
    """What is done after it stays: a number left in the node, also in another run of ComfyUI, undid
    it at the next queue.
    """
    file = closed_stack.file

    def queue(restore: int, node: str = "7") -> tuple[int, str]:
        cloned = type("Clone", (nodes.StackHistory,), {})
        cloned.hidden = types.SimpleNamespace(unique_id=node)
        _, report = cloned.execute(closed_stack, restore=restore)
        current = in_use(file)
        assert current
        return current.number, report

    for count in (1, 2):
        store.save_stack(make_stack(count), file)
    assert queue(1)[0] == queue(1)[0] == 1
    store.save_stack(make_stack(3), file)
    number, report = queue(1)
    assert number == 3
    assert report.startswith(
        "The stack went back to version 1 before and is now at version 3; nothing was done. To go "
        "back again, set restore to 0, queue, and set it to 1.\n\n"
    )
    assert queue(0, "12:8")[0] == queue(1)[0] == 3  # another node that lists
    assert "nothing was done" not in queue(0)[1]
    assert queue(1)[0] == 1
    assert queue(3)[0] == 3
    assert queue(1)[0] == 1
    with pytest.raises(StackError, match="There is no version 9"):
        queue(9)
    (cache_folder(file) / "restored.json").write_text("[")
    store.save_stack(make_stack(2), file)
    assert queue(3)[0] == 3  # what is damaged counts as nothing


def test_exported_files_that_were_deleted_are_written_again(
    nodes: Any, closed_stack: Any, tmp_path: Path
) -> None:
    """ComfyUI runs a node again if its fingerprint differs from that of the last run."""
    folders: Any = sys.modules["folder_paths"]
    folders.get_folder_paths = lambda kind: [str(tmp_path / kind)]
    store.save_stack(make_stack(2), closed_stack.file)
    node = nodes.ExportConcepts
    fresh = node.fingerprint_inputs(stack=None)
    node.execute(stack=closed_stack.now())
    assert node.fingerprint_inputs(stack=None) == fresh
    files = {path for kind in ("loras", "embeddings") for path in (tmp_path / kind).glob("[!.]*")}
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        path.unlink()
        assert node.fingerprint_inputs(stack=None) != fresh
        node.execute(stack=closed_stack.now())
        assert path.exists()
        assert node.fingerprint_inputs(stack=None) == fresh


def test_what_a_range_does_not_say_is_found_before_anything_runs(nodes: Any) -> None:
    """ComfyUI compares numbers with their widget's range, but for inputs that `validate_inputs`
    takes; so that takes exactly those whose setting refuses a number in the range.
    """
    for node in nodes.NODES:
        validate = getattr(node, "validate_inputs", None)
        checked = set(inspect.signature(validate).parameters) if validate else set()
        inputs = {port.id: port for port in node.define_schema().inputs}
        assert checked <= inputs.keys()
        assert inspect.getfullargspec(validate).varkw is None if validate else True
        kind = SETTINGS_OF.get(node.__name__)
        for field in dataclasses.fields(kind) if kind else ():
            port = inputs.get(field.name)
            if port is None or port.io_type not in ("INT", "FLOAT"):
                continue
            low, high = port.rest["min"], port.rest["max"]
            inside = [one for one in (low, low + 1, high - 1, high) if low <= one <= high]
            refused = [value for value in inside if _refuses(field, value)]
            assert (field.name in checked) == bool(refused), field.name
            for value in refused:
                given = {"token": "V1", "noun": "ball"} if "token" in checked else {}
                assert validate
                problem = validate(**given, **{field.name: [value]})
                assert isinstance(problem, str)
                assert problem.startswith(f"{field.name} is {value}; ")
                assert validate(**given, **{field.name: port.rest["default"]}) is True


def test_a_number_that_may_be_auto_has_a_range_all_the_same(nodes: Any) -> None:
    """Its widget is text, which has none in ComfyUI."""
    seen = set()
    for node in nodes.NODES:
        kind = SETTINGS_OF.get(node.__name__)
        ports = {port.id: port for port in node.define_schema().inputs}
        for field in dataclasses.fields(kind) if kind else ():
            port = ports.get(field.name)
            if port is None or field.default is not None or port.io_type == "COMBO":
                continue
            validate = node.validate_inputs
            assert field.name in inspect.signature(validate).parameters
            given = {"token": "V1", "noun": "ball"} if hasattr(node, "LATER") else {}
            low = min(field.metadata["low"], 0) - 1  # 0 stands for auto
            wrong = [low, str(low), "many"]
            wrong += [field.metadata["high"] + 1] if field.metadata["high"] else []
            for value in wrong:
                assert field.name in str(validate(**given, **{field.name: value})), value
            assert validate(**given, **{field.name: "auto"}) is True
            seen.add((node.__name__, field.name))
    assert {("LearnConcept", "rank"), ("LearnConcept", "rate"), ("MergeStacks", "rank")} <= seen


def _refuses(field: dataclasses.Field, value: float) -> bool:
    try:
        check_field(field, from_widget(field, value))
    except SettingError:
        return True
    return False


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"token": ["V1"], "noun": ["ball"]}, ""),
        ({"token": " V1 ", "noun": (None,)}, ""),
        ({"token": None, "noun": "a V1"}, ""),
        ({"token": [""], "noun": ["ball"]}, "token is empty"),
        ({"token": "../V1", "noun": "ball"}, "token '../V1' may contain only letters"),
        ({"token": "com1", "noun": "ball"}, "can't be a file name on Windows"),
        ({"token": ["V1"], "noun": [" "]}, "noun is empty"),
        ({"token": "V1", "noun": "ball\nof wool"}, "not a single line"),
        ({"token": "V1", "noun": "v1 ball"}, "contains V1 itself"),
        ({"token": "V1", "noun": "word " * 9}, "more than 8 words"),
    ],
)
def test_a_word_and_a_noun_are_checked_before_anything_runs(
    nodes: Any, given: dict[str, Any], problem: str
) -> None:
    """Wires are not: their value is None until they have one."""
    seen = nodes.LearnConcept.validate_inputs(**given)
    assert problem in seen if problem else seen is True
    if problem != "noun is empty":  # an imported LoRA may have none
        assert nodes.ImportLora.validate_inputs(**given) == seen


@hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(token=st.text(max_size=70), noun=st.text(max_size=90), name=st.text(max_size=70))
def test_any_text_is_accepted_or_refused_in_words(
    nodes: Any, token: str, noun: str, name: str
) -> None:
    for word in (token, "V1"):
        seen = nodes.LearnConcept.validate_inputs(token=word, noun=noun)
        assert seen is True or (isinstance(seen, str) and len(seen) < 400)
        if seen is True:
            concepts.check_spelling(word.strip())
            assert noun.strip()
    seen = nodes.LoadConceptStack.validate_inputs(stack_name=name)
    assert (seen is True) == bool(re.fullmatch(r"[\w-]{0,64}", name.strip()))


# What messages may name though no node shows it
NOT_IN_NODES = {"prompts", "out", "format", "settings", "optimizer"}


def test_every_name_in_a_message_is_a_widget_or_a_node(nodes: Any) -> None:
    schema = importlib.import_module("comfy_continual_lora.comfy_nodes.schema")
    shown = {s.display_name: {port.id for port in s.inputs} for s in _schemas(nodes)}
    inputs = set().union(*shown.values())
    for name in {*schema._WIDGETS, *schema.TITLES, *marked_names()} - NOT_IN_NODES:
        widget, _, node = schema.WIDGETS[name].partition(" of ")
        known = shown[node] if node else {*inputs, *(one.split(" (continual")[0] for one in shown)}
        assert widget in known, name


def _schemas(nodes: Any) -> list[Any]:
    return [node.define_schema() for node in nodes.NODES]


def test_errors_name_widgets(nodes: Any, closed_stack: Any) -> None:
    schema = importlib.import_module("comfy_continual_lora.comfy_nodes.schema")

    @schema.in_widget_names
    def execute() -> None:
        raise StackError("Leave `rank` out, or start another `stack`; or `replace` it.")

    with pytest.raises(StackError) as caught:
        execute()
    assert str(caught.value) == (
        "Leave rank out, or start another stack_name of Load Concept Stack; or if_word_exists it."
    )
    with pytest.raises(SettingError, match="energy is 3; the range is"):
        nodes.ConsolidateInClosedForm.execute(closed_stack, energy=3.0)
    for node in nodes.NODES:
        assert hasattr(node.execute, "__wrapped__") or node is nodes.ExamplePictures, node


def test_nothing_to_do_leaves_the_models_in_place(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is emptied when work begins, not where a request was done before."""
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    calls: list[str] = []
    for name in (
        "unload_all_models",
        "soft_empty_cache",
        "throw_exception_if_processing_interrupted",
    ):
        call = lambda name=name: calls.append(name)  # noqa: E731
        monkeypatch.setattr(host.model_management, name, call, raising=False)
    bar = type("Bar", (), {"__init__": lambda *_: None, "update_absolute": lambda *_: None})
    monkeypatch.setattr(host, "ProgressBar", bar)
    with host.at_work():
        pass
    assert "unload_all_models" not in calls
    with host.at_work() as on_progress:
        for step in (0, 1):
            on_progress(Progress("load", step, 1))
    assert calls.count("unload_all_models") == 1


def test_notes_are_shown_at_the_node_as_they_come_and_in_its_report(
    nodes: Any, closed_stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = importlib.import_module("comfy_continual_lora.comfy_nodes.host")
    bar = type("Bar", (), {"__init__": lambda *_: None, "update_absolute": lambda *_: None})
    shown: list[str] = []
    monkeypatch.setattr(host, "ProgressBar", bar)
    monkeypatch.setattr(host, "_show_at_node", shown.append)
    operations = importlib.import_module("comfy_continual_lora.operations").OPERATIONS

    def run(_: object, on_progress: Any) -> Any:
        for note in ("`stack` is new", "`stack` is new", "left out: a"):
            on_progress(Progress("load", 0, 1, note=note))
        return types.SimpleNamespace(summary=lambda: "Merged.")

    monkeypatch.setitem(operations, "merge", run)
    _, report = nodes.MergeStacks.execute(closed_stack, closed_stack)
    name = "stack_name of Load Concept Stack is new"
    assert shown[0].startswith(f"{name}\n")
    assert shown[-1].startswith(f"{name}\nleft out: a\n")
    assert report.startswith(f"{name}\nleft out: a\nMerged.")


class _Clip:
    """As much of ComfyUI's CLIP as says which layer is used."""

    def __init__(self, layer: int | None) -> None:
        self.layer_idx = layer

    def clone(self) -> _Clip:
        return _Clip(self.layer_idx)

    def clip_layer(self, layer: int) -> None:
        self.layer_idx = layer


def test_clip_skip_is_applied_unless_the_user_chose_a_layer(
    nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with_clip_skip = nodes.ApplyConcepts._with_clip_skip
    free, chosen, right = _Clip(None), _Clip(-1), _Clip(-2)
    assert with_clip_skip(free, 1) is free
    assert with_clip_skip(free, 2).layer_idx == -2
    assert free.layer_idx is None
    assert with_clip_skip(right, 2) is right
    assert not caplog.text
    assert with_clip_skip(chosen, 2).layer_idx == -1
    assert "clip skip 2, but CLIP Set Last Layer is at -1. Set it to -2" in caplog.text


def test_another_clip_than_anima_s_is_refused_there(nodes: Any, closed_stack: Any) -> None:
    of_anima = dataclasses.replace(make_stack(2), checkpoint=CheckpointInfo("anima"))
    stack = dataclasses.replace(closed_stack, selected=of_anima)
    clip = types.SimpleNamespace(tokenizer=types.SimpleNamespace(clip_l=None))
    with pytest.raises(StackError, match="This CLIP is not Anima's"):
        nodes.ApplyConcepts.execute(object(), clip, stack, 0.0)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_fit_the_nodes(nodes: Any, path: Path) -> None:
    """Every node, input and link of a workflow exists; it has a picture of the same name."""
    workflow = json.loads(path.read_text())
    ours = {s.node_id: s for s in _schemas(nodes)}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        assert node["type"] in ours or node["type"] in CORE
        assert (
            node["type"].startswith("Preview") or node.get("title") or node["type"] == "VAEDecode"
        )
        if node["type"] in ours:
            schema = ours[node["type"]]
            assert {one["name"] for one in node["inputs"]} <= {port.id for port in schema.inputs}
            assert [one["type"] for one in node["outputs"]] == [
                port.io_type.replace("LORAMODEL", "LORA_MODEL") for port in schema.outputs
            ]
            extra = sum(
                port.id == "seed" and bool(port.rest.get("control_after_generate"))
                for port in schema.inputs
            )
            widgets = [
                p
                for p in schema.inputs
                if p.io_type.split(",")[0] in ("STRING", "INT", "FLOAT", "COMBO", "BOOLEAN")
                and not p.rest.get("force_input")
            ]
            assert len(node["widgets_values"]) == len(widgets) + extra
    for number, source, slot, target, entry, kind in workflow["links"]:
        assert by_id[source]["outputs"][slot]["type"] == kind
        assert number in by_id[source]["outputs"][slot]["links"]
        assert by_id[target]["inputs"][entry]["link"] == number
    assert path.with_suffix(".jpg").exists()


def test_a_workflow_that_was_saved_with_numbers_for_auto_asks_for_the_same(nodes: Any) -> None:
    """Its values fall into the widgets that had them, and 0 still leaves it to the checkpoint."""
    saved = json.loads((REPOSITORY / "tests/data/workflow-with-numbers-for-auto.json").read_text())
    values = next(n for n in saved["nodes"] if n["type"] == "ContinualLora_Learn")["widgets_values"]
    ports = [
        port
        for port in nodes.LearnConcept.define_schema().inputs
        if "default" in port.rest and not port.rest.get("force_input")
    ]
    given = {port.id: value for port, value in zip(ports, values, strict=False)}
    of = importlib.import_module("comfy_continual_lora.comfy_nodes.schema").settings_from
    assert of(LearnSettings, given) == LearnSettings(preview_every=50)
    assert (given["token"], given["if_word_exists"]) == ("V1", "refuse")


LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_name_and_tooltip(nodes: Any, language: str) -> None:
    """Neither more nor less than the nodes declare, none empty, and none left in English."""
    path = REPOSITORY / "locales" / language / "nodeDefs.json"
    locale = json.loads(path.read_text(encoding="utf-8"))
    schemas = [node.define_schema() for node in nodes.NODES]
    assert locale.keys() == {s.node_id for s in schemas}
    for s in schemas:
        one = locale[s.node_id]
        assert one.keys() == {"display_name", "description", "inputs", "outputs"}
        assert one["display_name"] != s.display_name
        assert one["description"] != s.description
        assert one["inputs"].keys() == {port.id for port in s.inputs}
        assert one["outputs"].keys() == {str(number) for number in range(len(s.outputs))}
        pairs = [(port, one["inputs"][port.id]) for port in s.inputs]
        pairs += [(port, one["outputs"][str(n)]) for n, port in enumerate(s.outputs)]
        for port, words in pairs:
            tooltip = port.rest.get("tooltip")
            assert words.keys() == ({"name", "tooltip"} if tooltip else {"name"}), port.id
            assert all(words.values())
            assert words.get("tooltip") != tooltip or not tooltip


def test_all_languages_are_tested() -> None:
    assert {path.name for path in (REPOSITORY / "locales").iterdir()} == set(LANGUAGES)


def test_the_app_shows_widgets_that_exist() -> None:
    """App mode lists the widgets and the outputs to show, by their nodes."""
    (path,) = (path for path in WORKFLOWS if path.name.endswith(".app.json"))
    workflow = json.loads(path.read_text())
    types = {str(node["id"]): node["type"] for node in workflow["nodes"]}
    assert workflow["extra"]["linearMode"] is True
    shown = workflow["extra"]["linearData"]
    assert [types[node] for node in shown["outputs"]] == ["PreviewImage", "PreviewAny"]
    assert {(types[node], widget) for node, widget in shown["inputs"]} >= {
        ("ContinualLora_LoadStack", "checkpoint"),
        ("ContinualLora_Learn", "token"),
        ("CLIPTextEncode", "text"),
    }


def test_the_blueprint_fits_the_nodes(nodes: Any) -> None:
    """A subgraph for the node library: its links, and the widgets it shows, exist."""
    (path,) = (REPOSITORY / "subgraphs").glob("*.json")
    blueprint = json.loads(path.read_text())
    (inner,) = blueprint["definitions"]["subgraphs"]
    (outer,) = blueprint["nodes"]
    assert outer["type"] == inner["id"]
    assert path.stem == inner["name"]
    ours = {s.node_id: s for s in (node.define_schema() for node in nodes.NODES)}
    by_id = {node["id"]: node for node in inner["nodes"]}
    for node in inner["nodes"]:
        if node["type"] in ours:
            names = {port.id for port in ours[node["type"]].inputs}
            assert {one["name"] for one in node["inputs"]} <= names
        else:
            assert node["type"] in CORE
    for node, widget in outer["properties"]["proxyWidgets"]:
        schema = ours.get(by_id[int(node)]["type"])
        assert schema is None or widget in {port.id for port in schema.inputs}
    for link in inner["links"]:
        if link["origin_id"] > 0:
            source = by_id[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in source["links"]
        if link["target_id"] > 0:
            assert by_id[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    for side in ("inputs", "outputs"):
        assert [one["name"] for one in inner[side]] == [one["name"] for one in outer[side]]


def test_the_workflows_are_numbered() -> None:
    assert [path.stem[:2] for path in WORKFLOWS] == [f"{n}-" for n in range(1, len(WORKFLOWS) + 1)]
    assert len(WORKFLOWS) >= 5


def test_registering_imports_nothing_heavy_of_ours() -> None:
    """Everything the nodes' modules import at the top is light, ComfyUI's own aside."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_comfy_nodes import _stand_in, NEW; "
        "sys.modules.update(_stand_in(NEW));"
        "before = set(sys.modules); import comfy_continual_lora.comfy_nodes.nodes;"
        "found = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL', 'safetensors'} & "
        "(set(sys.modules) - before);"
        "sys.exit(f'imports {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
