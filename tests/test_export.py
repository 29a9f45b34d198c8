"""Stage 7: the exported files change the net exactly as the attached adapter does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_store import _record

from comfy_continual_lora import export, store
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import StackError
from comfy_continual_lora.lora import KINDS, delta_weights, new_adapter


def _stack(backbone: Backbone, kind: str) -> store.ConceptStack:
    generator = torch.Generator().manual_seed(3)
    adapter = {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in new_adapter(backbone, 4, generator, kind).items()}
    stack = store.ConceptStack("f", rank=4)
    stack.add(_record(1), torch.randn(3, 256, generator=generator), adapter)
    return stack


def _export(stack: store.ConceptStack, out: Path) -> export.Exported:
    return export.export_files(stack, out, out / "embeddings", "mini")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_same_change(backbone: Backbone, tmp_path: Path, kind: str) -> None:
    stack = _stack(backbone, kind)
    done = _export(stack, tmp_path)
    assert done.lora
    tensors = load_file(done.lora)
    assert stack.adapter
    for layer, change in delta_weights(backbone, stack.adapter).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        if kind == "full":
            found = tensors.pop(f"{name}.diff").float()
        else:
            down, up, alpha = (tensors.pop(f"{name}.{leaf}").float() for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
            found = up @ down * alpha / len(down)
        assert torch.allclose(found, change, atol=2e-3)
    assert not tensors


def test_words_card_and_metadata(backbone: Backbone, tmp_path: Path) -> None:
    stack = _stack(backbone, "lora")
    done = _export(stack, tmp_path)
    assert [p.name for p in done.embeddings] == ["V1.safetensors"]
    word = load_file(done.embeddings[0])
    assert list(word) == ["emb_params"]
    assert torch.allclose(word["emb_params"].float(), stack.tokens["V1"], atol=2e-3)
    assert done.lora
    with safe_open(done.lora, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "V1 mug"
    assert metadata["ss_output_name"] == done.lora.stem
    assert json.loads(done.lora.with_suffix(".json").read_text())["activation text"] == "V1 mug"


def test_a_changed_adapter_gets_a_new_name(backbone: Backbone, tmp_path: Path) -> None:
    stack = _stack(backbone, "lora")
    first = _export(stack, tmp_path).lora
    assert _export(stack, tmp_path).lora == first
    assert stack.adapter
    next(iter(stack.adapter.values())).add_(1)
    assert _export(stack, tmp_path).lora != first


def test_a_full_size_change_has_no_place_in_peft(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="only kohya's format can hold it"):
        export.export_files(_stack(backbone, "full"), tmp_path, tmp_path, "mini", "peft")
    assert not list(tmp_path.iterdir())


def test_nothing_to_export(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="nothing to export"):
        _export(store.ConceptStack("f"), tmp_path)
