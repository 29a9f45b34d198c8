"""LoRAs and embeddings of other programs come in as strong as they are meant, or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_store import make_stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from comfy_continual_lora import foreign, pipeline, requests, store
from comfy_continual_lora.adapters.adapter import delta_weights
from comfy_continual_lora.checkpoint.backbone import KV_MODULES, Backbone
from comfy_continual_lora.errors import ContinualLoraError, SettingError, StackError
from comfy_continual_lora.settings import LearnSettings

Tensors = dict[str, Tensor]
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def kohya_lora(backbone: Backbone, rank: int = 2, alpha: float | None = None) -> Tensors:
    """A random LoRA of every K and V, under kohya's names."""
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, module in backbone.kv_layers.items():
        out, width = module.weight.shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width, generator=draws)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=draws)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def plain_lora(backbone: Backbone, prefix: str, rank: int = 2) -> Tensors:
    """The same under PEFT's names."""
    tensors = kohya_lora(backbone, rank)
    return {
        f"{prefix}{layer}.lora_{letter}.weight": tensors[
            f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"
        ]
        for layer in backbone.kv_layers
        for letter, part in (("A", "down"), ("B", "up"))
    }


def of_first(part: str) -> str:
    return f"lora_unet_{FIRST.replace('.', '_')}.{part}"


def in_diffusers_layout(folder: Path) -> Path:
    """What PEFT saved in `folder`, as diffusers saves it: one file, with the settings in its header."""
    declared = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("base_model.model", "unet"): one for name, one in tensors.items()},
        path := folder / "diffusers.safetensors",
        {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in declared.items()})},
    )
    return path


PEFT_FIELDS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 4, "lora_alpha": 2, "rank_pattern": {"attn2.to_k": 3}},
    {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_v": 1, "down_blocks.0.*to_k": 7}},
    {"r": 2, "lora_alpha": 2, "rank_pattern": {rf"^{FIRST}": 5}, "alpha_pattern": {FIRST: 20}},
]


@pytest.mark.parametrize("fields", PEFT_FIELDS)
@pytest.mark.parametrize("layout", ["folder", "file", "diffusers"])
def test_the_strength_is_the_one_peft_computes(
    backbone: Backbone, tmp_path: Path, fields: dict[str, Any], layout: str
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=KV_MODULES, init_lora_weights=False, **fields)
    unet: Any = get_peft_model(copy.deepcopy(backbone.unet), config)  # type: ignore[arg-type]
    unet.save_pretrained(str(tmp_path))
    path = tmp_path / ("" if layout == "folder" else "adapter_model.safetensors")
    if layout == "diffusers":
        path = in_diffusers_layout(tmp_path)
    found = delta_weights(backbone, foreign.read_lora(path, backbone))
    for layer, change in found.items():
        wanted = (
            unet.get_submodule(f"base_model.model.{layer}").get_delta_weight("default").detach()
        )
        assert torch.allclose(change, wanted, atol=1e-6 * float(wanted.abs().max()))


def test_alpha_of_each_layer_counts(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(kohya_lora(backbone), path)
    plain = delta_weights(backbone, foreign.read_lora(path, backbone))
    tensors = kohya_lora(backbone, alpha=1.0)
    tensors[of_first("alpha")] = torch.tensor([6])
    save_file(tensors, path)
    scaled = delta_weights(backbone, foreign.read_lora(path, backbone, strength=-2.0))
    for layer, change in scaled.items():
        factor = -2 * (6 if layer == FIRST else 1) / 2
        assert torch.allclose(change, factor * plain[layer], atol=1e-5)


def test_matrices_stored_as_convolutions_are_the_same_matrices(
    backbone: Backbone, tmp_path: Path
) -> None:
    path, tensors = tmp_path / "a.safetensors", kohya_lora(backbone)
    save_file(tensors, path)
    plain = foreign.read_lora(path, backbone)
    save_file({name: tensor[..., None, None] for name, tensor in tensors.items()}, path)
    found = foreign.read_lora(path, backbone)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_a_layer_that_is_not_changed_stays(backbone: Backbone, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", kohya_lora(backbone)
    tensors[of_first("lora_up.weight")].zero_()
    save_file(tensors, path)
    assert not delta_weights(backbone, foreign.read_lora(path, backbone))[FIRST].any()


NAN, INFINITE = float("nan"), float("inf")
UP, DOWN, ALPHA = (of_first(part) for part in ("lora_up.weight", "lora_down.weight", "alpha"))
BROKEN: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda t: {UP: t[UP].fill_(NAN)}, "lora_up.weight has the value nan; expected finite"),
    (lambda t: {DOWN: t[DOWN].fill_(-INFINITE)}, "lora_down.weight has the value inf"),
    (lambda t: {UP: t[UP].fill_(1e30)}, "up to 65504"),
    (lambda t: {UP: torch.ones(len(t[UP]), 7)}, "2 rows and .*lora_up.weight 7 columns"),
    (lambda t: {DOWN: t[DOWN][:0], UP: t[UP][:, :0]}, "0 rows and .* 0 columns"),
    (lambda t: {DOWN: t[DOWN][0]}, "lora_down.weight is 64 of float32; expected a matrix"),
    (lambda t: {UP: t[UP][..., None]}, "x 2 x 1 of float32; expected a matrix"),
    (lambda t: {UP: t[UP][..., None, None].repeat(1, 1, 3, 3)}, "3 x 3 of float32"),
    (lambda t: {UP: t[UP].to(torch.int8)}, "of int8; expected a matrix"),
    (lambda t: {UP: t[UP].to(torch.complex64)}, "of complex64; expected a matrix"),
    (lambda t: {ALPHA: torch.tensor(NAN)}, "alpha has the value nan"),
    (lambda t: {ALPHA: torch.ones(3)}, "alpha is 3 of float32; expected one number"),
    (lambda t: {ALPHA: torch.tensor(True)}, "a single number of bool; expected one number"),
    (lambda t: {name: torch.zeros_like(tensor) for name, tensor in t.items()}, "changes nothing"),
    (lambda t: {of_first("dora_scale"): torch.ones(4)}, "dora_scale belongs to a DoRA"),
    (lambda t: {of_first("hada_w1_a"): torch.ones(4)}, "belongs to a LoHa"),
    (lambda t: {of_first("oft_blocks"): torch.ones(4)}, "belongs to another kind"),
    (lambda t: {f"diffusion_model.{FIRST}.oft_blocks": torch.ones(4)}, "belongs to another kind"),
    (lambda t: {f"diffusion_model.{FIRST}.diff": torch.ones(4)}, "belongs to a full-size change"),
    (lambda t: {f"{FIRST}_custom_diffusion.weight": torch.ones(4)}, "to Custom Diffusion's full"),
    (lambda t: {f"unet.{FIRST}.lora_B.weight": t[UP].clone()}, "two tensors for the same matrix"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_is_broken_is_refused_with_its_tensor(
    backbone: Backbone,
    tmp_path: Path,
    change: Callable[[Tensors], Tensors],
    message: str,
) -> None:
    tensors = kohya_lora(backbone)
    save_file({k: t.contiguous() for k, t in (tensors | change(tensors)).items()}, tmp_path / "a")
    with pytest.raises(StackError, match=message) as error:
        foreign.read_lora(tmp_path / "a", backbone)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"r": 2', "not valid JSON"),
        ('{"r": 2}\x00', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not an object"),
        ('{"r": "2"}', "r is '2'; expected a rank"),
        ('{"r": true}', "expected a rank"),
        ('{"r": 2, "lora_alpha": NaN}', "lora_alpha is nan; expected a number"),
        ('{"r": 2, "lora_alpha": 1e999}', "lora_alpha is inf"),
        ('{"r": 2, "alpha_pattern": ["to_k"]}', "alpha_pattern is .*simple patterns"),
        ('{"r": 2, "alpha_pattern": {"(": 2}}', "alpha_pattern"),
        ('{"r": 2, "alpha_pattern": {"([a-z0-9_.]+)+!": 2}}', "alpha_pattern"),
        ('{"r": 2, "alpha_pattern": {"to_k": null}}', "alpha_pattern"),
        ('{"r": 2, "use_rslora": 1}', "use_rslora is 1; expected true or false"),
        ('{"r": 16, "lora_alpha": 16}', "has rank 16, but its matrices have 2"),
        ('{"peft_type": "LOHA"}', "this is a LOHA"),
        ('{"r": 2, "use_dora": true}', "this is a DoRA"),
        ('{"r": 2, "init_lora_weights": "pissa_niter_16"}', "began as pissa_niter_16"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "metadata"])
def test_what_says_the_strength_is_checked(
    backbone: Backbone, tmp_path: Path, config: str, message: str, layout: str
) -> None:
    folder, metadata = tmp_path / "lora", {}
    folder.mkdir()
    if layout == "folder":
        (folder / "adapter_config.json").write_text(config)
    else:
        metadata = {"lora_adapter_metadata": config}
    save_file(plain_lora(backbone, "unet."), folder / "adapter_model.safetensors", metadata)
    with pytest.raises(StackError, match=message):
        foreign.read_lora(folder, backbone)


def test_two_alphas_are_ambiguous(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = kohya_lora(backbone, alpha=1.0)
    save_file(tensors, path, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'})
    with pytest.raises(StackError, match=r"alpha, but .*how strong the LoRA is, too"):
        foreign.read_lora(path, backbone)


@pytest.mark.parametrize("strength", [0.0, NAN, INFINITE, 1e300, 11.0])
def test_a_strength_that_can_not_be_is_refused(
    backbone: Backbone, tmp_path: Path, strength: float
) -> None:
    save_file(kohya_lora(backbone), tmp_path / "a.safetensors")
    given = {"checkpoint": "c", "lora": "a", "token": "W1", "strength": strength}
    if strength:
        with pytest.raises(SettingError, match="strength"):
            requests.parse(requests.ImportRequest, given)
        with pytest.raises(
            SettingError, match=r"strength is .*(the range is -10 to 10|a finite number)"
        ):
            requests.ImportRequest(Path("c"), Path("a"), "W1", strength=strength).check()
    if strength != 11:
        with pytest.raises(StackError, match="at strength"):
            foreign.read_lora(tmp_path / "a.safetensors", backbone, strength)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"e": torch.full((1, 64), NAN)}, "its tensor e has the value nan"),
        ({"e": torch.full((1, 64), 1e6)}, "has the value 1e[+]06; expected finite"),
        ({"e": torch.zeros(1, 65)}, r"with 64 numbers each; found e \(1 x 65 of float32\)"),
        ({"e": torch.zeros(17, 64)}, "Expected 1 to 16 vectors"),
        ({"e": torch.zeros(0, 64)}, "Expected 1 to 16 vectors"),
        ({"e": torch.ones(1, 64, dtype=torch.int64)}, "of int64"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 80)}, "clip_g .*clip_l"),
        ({}, "found nothing"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(
    backbone: Backbone, tmp_path: Path, tensors: Tensors, message: str
) -> None:
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(StackError, match=message):
        foreign.read_word(tmp_path / "e.safetensors", backbone)


def test_a_folder_of_peft_becomes_a_concept(
    checkpoint: Path, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    request = requests.ImportRequest(checkpoint, folder, "W1", "ball", trigger="red", device="cpu")
    with pytest.raises(StackError, match=r"no file .*adapter_model.safetensors"):
        pipeline.import_concept(request)
    save_file(plain_lora(backbone, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    pipeline.import_concept(request)
    adapter = store.open_stack(store.stack_path(checkpoint)).adapter
    assert adapter
    plain = kohya_lora(backbone)
    wanted = 4 * plain[UP] @ plain[DOWN]
    assert torch.allclose(delta_weights(backbone, adapter)[FIRST], wanted, atol=1e-4)


def test_an_imported_concept_has_no_pictures_to_consolidate_with(
    learned: Callable[..., Path], backbone: Backbone, folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = learned(LearnSettings(method="lora", steps=2, batch=2, rank=2, size=64), "V1")
    save_file(kohya_lora(backbone), tmp_path / "a.safetensors")
    lora = tmp_path / "a.safetensors"
    pipeline.import_concept(
        requests.ImportRequest(checkpoint, lora, "W1", "ball", trigger="red", device="cpu")
    )
    with pytest.raises(StackError, match="W1 was imported, so there are no pictures"):
        pipeline.consolidate(requests.ConsolidateRequest(checkpoint, folders["V1"], device="cpu"))


NUMBERS = st.sampled_from([NAN, INFINITE, -1.0, 0.0, 1e-40, 1.0, 3e4, 1e38])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 32, 64]), max_size=4)
DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]
)
FIELDS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "use_dora"]
)
PATTERNS = st.sampled_from(["to_k", "^down", ".*", "(a+)+$", "(", "[", "a{9999999999}", "\\", ""])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.just(10**400), st.text(max_size=3)
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tensors=st.dictionaries(
        st.sampled_from([UP, DOWN, ALPHA, "x", of_first("diff")]),
        st.tuples(SHAPES, NUMBERS, DTYPES),
        max_size=2,
    ),
    config=st.none()
    | st.dictionaries(
        FIELDS, st.one_of(VALUES, st.dictionaries(PATTERNS, VALUES, max_size=2)), max_size=3
    ),
    cut=st.none() | st.integers(0, 300),
)
def test_any_file_is_taken_whole_and_finite_or_refused(
    backbone: Backbone,
    tmp_path: Path,
    tensors: dict[str, tuple[list[int], float, torch.dtype]],
    config: dict[str, Any] | None,
    cut: int | None,
) -> None:
    path = tmp_path / "a.safetensors"
    changed = {
        name: torch.full(shape, number).to(dtype)
        for name, (shape, number, dtype) in tensors.items()
    }
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    path.write_bytes(save({**kohya_lora(backbone), **changed}, metadata)[:cut])
    assert _is_finite_or_refused(lambda: list(foreign.read_lora(path, backbone).values()), path)
    assert _is_finite_or_refused(lambda: [foreign.read_word(path, backbone)], path)


def _is_finite_or_refused(read: Callable[[], list[Tensor]], path: Path) -> bool:
    try:
        return all(bool(tensor.isfinite().all()) for tensor in read())
    except ContinualLoraError as error:
        return str(path) in str(error)


# --- what a LoRA changes besides K and V ---------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "diffusers"])
def test_the_rest_of_a_lora_is_measured_and_kept_as_strong_as_it_was(
    backbone: Backbone, tmp_path: Path, layout: str
) -> None:
    """A LoRA of all attention and a convolution: K and V become the concept, and with the file of
    the rest they are what PEFT computes.
    """
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"],
        alpha_pattern={"to_q": 12},
        init_lora_weights=False,
    )
    unet: Any = get_peft_model(copy.deepcopy(backbone.unet), config)  # type: ignore[arg-type]
    folder = tmp_path / "lora"
    unet.save_pretrained(str(folder))
    path = in_diffusers_layout(folder) if layout == "diffusers" else folder
    changes = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    whole = sum(float(change.square().sum()) for change in changes.values())
    others = {name: one for name, one in changes.items() if name not in backbone.kv_layers}
    share = sum(float(change.square().sum()) for change in others.values()) / whole

    with pytest.raises(StackError, match=rf"{len(others)} layers besides K .* are {share:.0%} of"):
        foreign.read_lora(path, backbone)
    adapter, rest = foreign.read_parts(path, backbone)
    assert rest
    assert rest.layers == len(others)
    assert rest.share == pytest.approx(share, rel=1e-4)
    for layer, change in delta_weights(backbone, adapter).items():
        assert torch.allclose(change, changes[layer], atol=1e-5)

    kept = rest.keep(path)
    assert kept == path.with_name(f"{path.stem}-without-kv.safetensors")
    stored = load_file(kept)
    assert len(stored) == 2 * len(others)
    for layer, change in others.items():
        down, up = (
            next(t for n, t in stored.items() if f".{layer}.lora_{letter}." in n) for letter in "AB"
        )
        found = (up.flatten(1) @ down.flatten(1)).view_as(change)
        assert torch.allclose(found, change, atol=1e-5 * float(change.abs().max()))
    with pytest.raises(StackError, match="changes nothing of K and V"):
        foreign.read_parts(kept, backbone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["bundled"],
            r"1 layer besides K .*, which is 0% of .* norm, without what 1 of them .* bundled\.",
        ),
        (
            ["a.lokr_w1", "a.lokr_w2", "b.alpha"],
            "2 layers .* are 0% of .* without what 1 of them changes",
        ),
        (["a.lora_down.weight", "a.lora_up.weight", "a.lora_mid.weight"], "without what 1 of them"),
        (["a.lora_down.weight", "a.lora_up.weight"], r"1 layer besides .* by squared norm, for ex"),
    ],
)
def test_what_is_not_measured_of_the_rest_is_said(
    backbone: Backbone, tmp_path: Path, more: Sequence[str], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(kohya_lora(backbone) | {name: torch.ones(1, 1) for name in more}, path)
    with pytest.raises(StackError, match=message):
        foreign.read_lora(path, backbone)


QUERY = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("declared", "net", "factor", "texts"),
    [
        ({"unet": (4, 4), "text_encoder": (8, 8)}, "unet.", 1.0, [("text_encoder", 8, 1.0)]),
        ({"unet": (4, 16), "text_encoder": (4, 4)}, "unet.", 4.0, [("text_encoder", 4, 1.0)]),
        ({"unet": (4, 16)}, "unet.", 4.0, [("text_encoder", 8, 1.0)]),
        ({"text_encoder": (8, 4)}, "unet.", 1.0, [("text_encoder", 8, 0.5)]),
        ({"transformer": (4, 16), "text_encoder": (2, 1)}, "", 4.0, [("text_encoder", 2, 0.5)]),
        (
            {"unet": (4, 2), "text_encoder": (8, 8), "text_encoder_2": (2, 6)},
            "unet.",
            0.5,
            [("text_encoder", 8, 1.0), ("text_encoder_2", 2, 3.0), ("lora_te1", 2, 1.0)],
        ),
        ({"": (4, 16)}, "unet.", 4.0, [("text_encoder", 4, 4.0)]),
    ],
)
def test_each_component_is_as_strong_as_is_declared_for_it(
    backbone: Backbone,
    tmp_path: Path,
    declared: dict[str, tuple[int, float]],
    net: str,
    factor: float,
    texts: list[tuple[str, int, float]],
) -> None:
    """A diffusers file of the net and text encoders, by component: rank and alpha."""
    path, tensors = tmp_path / "dog.safetensors", plain_lora(backbone, net, 4)
    for name, rank, _ in texts:
        tensors[f"{name}.{QUERY}.lora_A.weight"] = torch.full((rank, 64), 0.1)
        tensors[f"{name}.{QUERY}.lora_B.weight"] = torch.ones(64, rank)
    fields = {
        f"{name}.{field}".lstrip("."): value
        for name, (rank, alpha) in declared.items()
        for field, value in (("r", rank), ("lora_alpha", alpha))
    }
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(fields)})
    adapter, rest = foreign.read_parts(path, backbone)
    found = delta_weights(backbone, adapter)[FIRST]
    down, up = (tensors[f"{net}{FIRST}.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(found, factor * up @ down, atol=1e-3)
    assert rest
    stored = load_file(rest.keep(path))
    left = 0.0
    for name, rank, strength in texts:
        up = stored[f"{name}.{QUERY}.lora_B.weight"]
        assert torch.equal(up, torch.full((64, rank), strength))
        left += (strength * 0.1 * rank * 64) ** 2
    kept = sum(float(one.square().sum()) for one in delta_weights(backbone, adapter).values())
    assert rest.share == pytest.approx(left / (left + kept), rel=1e-4)


def test_a_transformers_declaration_is_read(backbone: Backbone, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", plain_lora(backbone, "transformer.", 4)
    save_file(tensors, path)
    plain = foreign.read_lora(path, backbone)
    fields = '{"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.alpha_pattern": {}}'
    save_file(tensors, path, {"lora_adapter_metadata": fields})
    found = foreign.read_lora(path, backbone)
    assert torch.equal(found[f"{FIRST}.B"], 4 * plain[f"{FIRST}.B"])


@pytest.mark.parametrize("pattern", [QUERY, f"^{QUERY}", "q_proj"])
def test_a_text_encoders_pattern_matches_its_own_names(
    backbone: Backbone, tmp_path: Path, pattern: str
) -> None:
    path, tensors = tmp_path / "a.safetensors", plain_lora(backbone, "unet.", 4)
    tensors[f"text_encoder_2.{QUERY}.lora_A.weight"] = torch.ones(2, 64)
    tensors[f"text_encoder_2.{QUERY}.lora_B.weight"] = torch.ones(64, 2)
    fields = {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "text_encoder_2.rank_pattern": {pattern: 2},
        "text_encoder_2.alpha_pattern": {pattern: 10},
    }
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(fields)})
    _, rest = foreign.read_parts(path, backbone)
    assert rest
    stored = rest.tensors[f"text_encoder_2.{QUERY}.lora_B.weight"]
    assert torch.equal(stored, torch.full((64, 2), 5.0))


def with_others(backbone: Backbone) -> Tensors:
    """K and V, a text encoder's layer, and a DoRA's layer with its magnitudes."""
    return {
        **kohya_lora(backbone, alpha=2.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 64),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(128, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(8),
    }


def test_the_rest_is_refused_left_out_or_kept_as_asked_for(
    checkpoint: Path, backbone: Backbone, tmp_path: Path
) -> None:
    lora, tensors = tmp_path / "dog.safetensors", with_others(backbone)
    save_file(tensors, lora, {"ss_output_name": "dog"})
    request = requests.ImportRequest(checkpoint, lora, "W1", "ball", trigger="red", device="cpu")
    with pytest.raises(StackError, match=r"2 layers besides.*give rest drop.*or keep"):
        pipeline.import_concept(request)
    left = pipeline.import_concept(replace(request, rest="drop"))
    assert "Left out: its 2 layers besides K and V" in left.summary()
    file = tmp_path / "dog-without-kv.safetensors"
    assert not file.exists()

    file.write_bytes(b"another's")
    keep = replace(request, token="W2", rest="keep", strength=0.5)
    with pytest.raises(StackError, match="exists and is another file"):
        pipeline.import_concept(keep)
    assert file.read_bytes() == b"another's"
    file.unlink()
    kept = pipeline.import_concept(keep)
    assert kept.kept == file
    assert "Load that too, at strength 0.5" in kept.summary()
    stored = load_file(file)
    assert stored.keys() == tensors.keys() - kohya_lora(backbone, alpha=2.0).keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)
    tokens = store.open_stack(store.stack_path(checkpoint)).tokens
    assert list(tokens) == ["W1", "W2"]


def test_the_rest_is_kept_too_of_what_is_on_the_stack_already(
    checkpoint: Path, backbone: Backbone, tmp_path: Path
) -> None:
    lora, stack = tmp_path / "dog.safetensors", store.stack_path(checkpoint)
    save_file(with_others(backbone), lora)
    request = requests.ImportRequest(
        checkpoint, lora, "W1", "ball", trigger="red", device="cpu", rest="drop"
    )
    pipeline.import_concept(request)
    pipeline.rename(requests.RenameRequest(checkpoint, "W1", "W2"))
    before = stack.read_bytes()
    file = tmp_path / "dog-without-kv.safetensors"
    for _ in range(2):
        kept = pipeline.import_concept(replace(request, rest="keep"))
        assert kept.again
        assert kept.kept == file
        assert f"already on the stack as W2 ball. In {file}: its 2 layers besides" in kept.summary()
        assert kept.summary().endswith("Load that too, at strength 1.")
        assert len(load_file(file)) == 4
    again = pipeline.import_concept(request)
    assert again.summary().endswith("already on the stack as W2 ball; nothing was done.")
    file.write_bytes(b"another's")
    with pytest.raises(StackError, match="exists and is another file"):
        pipeline.import_concept(replace(request, rest="keep"))
    assert file.read_bytes() == b"another's"
    for make in (Path.mkdir, lambda path: path.symlink_to("nowhere")):
        file.rmdir() if file.is_dir() else file.unlink()
        make(file)
        with pytest.raises(StackError, match="exists and is another file"):
            pipeline.import_concept(replace(request, rest="keep"))
    assert stack.read_bytes() == before


def test_what_is_on_the_stack_is_not_imported_again_as_another_thing(
    checkpoint: Path, backbone: Backbone, tmp_path: Path
) -> None:
    lora, stack = tmp_path / "a.safetensors", store.stack_path(checkpoint)
    save_file(kohya_lora(backbone), lora)
    word = backbone.word_of_vocabulary("red")
    assert word is not None
    for name, vectors in (("red", word), ("two", torch.cat([word, word])), ("other", word * 1.1)):
        save_file({"e": vectors}, tmp_path / name)
    request = requests.ImportRequest(checkpoint, lora, "W1", "a ball", trigger="red", device="cpu")
    pipeline.import_concept(request)
    before = stack.read_bytes()
    others = [
        ({"noun": "teapot"}, "as W1 ball, so it was not imported with the noun teapot"),
        ({"noun": ""}, "as W1 ball, so it was not imported without a noun"),
        ({"trigger": "blue"}, "as W1 ball from another word, .* from this trigger"),
        ({"trigger": "", "embedding": tmp_path / "two"}, "another word, .* from this embedding"),
        ({"trigger": "", "embedding": tmp_path / "other"}, "another word, .* this embedding"),
        ({"strength": 2.0, "noun": "teapot"}, "as W1 ball at strength 1, so .* imported at 2"),
    ]
    for fields, message in others:
        with pytest.raises(StackError, match=f"{message}. Forget W1 first, or give another token"):
            pipeline.import_concept(replace(request, **fields))
    same = replace(request, noun="ball", trigger="", embedding=tmp_path / "red")
    assert pipeline.import_concept(same).again
    pipeline.rename(requests.RenameRequest(checkpoint, "W1", "W2"))
    assert pipeline.import_concept(same).record.token == "W2"
    with pytest.raises(StackError, match="as W2 ball, so it was not imported with the noun mug"):
        pipeline.import_concept(replace(same, noun="mug"))
    pipeline.undo(requests.UndoRequest(checkpoint))
    assert stack.read_bytes() == before


def test_a_lora_that_both_stacks_have_in_another_way_is_not_taken_for_the_same(
    checkpoint: Path, backbone: Backbone, tmp_path: Path
) -> None:
    lora, other = tmp_path / "a.safetensors", tmp_path / "other.concepts.safetensors"
    save_file(kohya_lora(backbone), lora)
    request = requests.ImportRequest(checkpoint, lora, "W1", "ball", trigger="red", device="cpu")
    pipeline.import_concept(request)
    merging = requests.MergeRequest(checkpoint, other, device="cpu")
    others = [
        ({"strength": 0.5}, "has W1 ball at strength 0.5, which .* as W1 ball at strength 1. For"),
        ({"noun": "cup"}, "has W1 cup at strength 1, which .* as W1 ball at strength 1. Forget"),
        ({"trigger": "blue"}, "W1 ball at strength 1, from another word. Forget W1 on one of them"),
    ]
    before = store.stack_path(checkpoint).read_bytes()
    for fields, message in others:
        pipeline.import_concept(replace(request, **fields, stack=other))
        with pytest.raises(StackError, match=message):
            pipeline.merge(merging)
        other.unlink()
    assert store.stack_path(checkpoint).read_bytes() == before
    pipeline.import_concept(replace(request, stack=other))
    assert pipeline.merge(merging).added == []
    pipeline.rename(requests.RenameRequest(checkpoint, "W1", "W3", stack=other))
    pipeline.import_concept(replace(request, token="W2", stack=other))
    assert pipeline.merge(merging).added == ["W2 ball"]


def test_a_concept_that_was_learned_is_no_import_in_another_way() -> None:
    """What is refused, and what is advised, is about a LoRA that both imported."""
    stack, other = make_stack(2), make_stack(2)
    other.words = {key: word + 1 for key, word in other.words.items()}
    foreign.check_shared(stack, other, Path("other.concepts.safetensors"))


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("shapes", [((0, 64), (128, 0)), ((0, 8, 3, 3), (8, 0, 1, 1))])
@pytest.mark.parametrize("rest", ["refuse", "drop", "keep"])
def test_a_rank_of_zero_is_damage_in_any_layer(
    checkpoint: Path,
    backbone: Backbone,
    tmp_path: Path,
    shapes: Sequence[tuple[int, ...]],
    rest: str,
    alpha: bool,
) -> None:
    lora, tensors = tmp_path / "dog.safetensors", kohya_lora(backbone)
    for end, shape in zip(("down", "up"), shapes, strict=True):
        tensors[f"more.lora_{end}.weight"] = torch.ones(shape)
    if alpha:
        tensors["more.alpha"] = torch.tensor(1.0)
    save_file(tensors, lora)
    request = requests.ImportRequest(
        checkpoint, lora, "W1", "ball", trigger="red", device="cpu", rest=rest
    )
    with pytest.raises(StackError, match=r"is damaged: more.lora_down.weight has 0 rows"):
        pipeline.import_concept(request)
    assert not store.stack_path(checkpoint).exists()
    assert not list(tmp_path.glob("*-without-kv*"))


@pytest.mark.parametrize("given", [".", "", "..", "inner/..", "../dog"])
def test_the_rest_of_a_folder_is_kept_beside_it_however_it_is_given(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    folder = tmp_path / "dog"
    (folder / "inner").mkdir(parents=True)
    tensors = {f"base_model.model.mid.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    tensors |= plain_lora(backbone, "base_model.model.")
    save_file(tensors, folder / "adapter_model.safetensors")
    monkeypatch.chdir(folder / "inner" if given == ".." else folder)
    _, rest = foreign.read_parts(Path(given), backbone)
    assert rest
    kept = rest.keep(Path(given))
    assert kept.resolve() == tmp_path / "dog-without-kv.safetensors"
    assert len(load_file(kept)) == 2


def test_a_rest_with_values_out_of_range_is_not_kept(backbone: Backbone, tmp_path: Path) -> None:
    lora = tmp_path / "dog.safetensors"
    save_file(with_others(backbone) | {"more.lora_up.weight": torch.full((2, 2), NAN)}, lora)
    _, rest = foreign.read_parts(lora, backbone)
    assert rest
    with pytest.raises(StackError, match=r"more\.lora_up\.weight has the value nan"):
        rest.keep(lora)
    assert [path.name for path in tmp_path.iterdir()] == ["dog.safetensors"]
