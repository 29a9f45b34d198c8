"""Stage 8: what a stack remembers of itself: the matrix, what it is measured against, and its
pictures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_learn import save_concept
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from comfy_continual_lora import evaluate, pipeline, report, requests, store
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import CheckpointError, ConceptImagesError, StackError
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import EvaluateSettings, LearnSettings

QUICK = EvaluateSettings(pictures=2, steps=2, trials=2, size=64)


@pytest.fixture(scope="module")
def taught(mini_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with two concepts and the folder of their pictures."""
    root = tmp_path_factory.mktemp("taught")
    checkpoint, settings = (
        root / "mini.safetensors",
        LearnSettings(method="lora", steps=6, batch=2, rank=4, size=64, rate=0.02, token_rate=0.02),
    )
    checkpoint.write_bytes(mini_file.read_bytes())
    (root / "concepts").mkdir()
    for token, noun, index in (("V1", "ball", 0), ("V2", "teapot", 1)):
        folder = save_concept(root / "concepts" / token, index)
        pipeline.learn_concept(
            requests.LearnRequest(checkpoint, folder, token, noun, settings, device="cpu")
        )
    return checkpoint, root / "concepts"


def test_against_what_was_drawn_right_after_learning(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    result = pipeline.evaluate(
        requests.EvaluateRequest(taught[0], settings=QUICK, device="cpu"), seen.append
    )
    assert result.names == ["V1 ball", "V2 teapot"]
    assert torch.allclose(result.likeness.diagonal(), torch.ones(2), atol=1e-5)
    assert result.likeness[0, 1].isnan()
    assert result.likeness[1, 0] < 1
    expected = (result.likeness[1, 0] - result.floor[0]) / (1 - result.floor[0])
    assert torch.isclose(result.kept[0], expected)
    assert torch.isclose(result.kept[1], torch.tensor(1.0), atol=1e-4)
    assert ((result.recognised >= 0) & (result.recognised <= 1)).all()
    assert {at: len(pictures) for at, pictures in result.pictures.items()} == {
        (0, 0): 2,
        (1, 0): 2,
        (1, 1): 2,
    }
    assert not np.array_equal(
        np.asarray(result.pictures[0, 0][0]), np.asarray(result.pictures[1, 0][0])
    )
    assert {p.stage for p in seen} == {"load", "evaluate", "score"}
    report.retention_sheet(result).save(tmp_path / "sheet.png")
    assert len(result.summary().splitlines()) == 3


def test_against_the_users_own_pictures(taught: tuple[Path, Path]) -> None:
    result = pipeline.evaluate(
        requests.EvaluateRequest(taught[0], taught[1], settings=QUICK, device="cpu")
    )
    assert (result.likeness.diagonal() < 1).all()
    only = replace(QUICK, seed=5)
    other = pipeline.evaluate(
        requests.EvaluateRequest(taught[0], taught[1], settings=only, device="cpu")
    )
    assert not torch.equal(result.likeness.nan_to_num(), other.likeness.nan_to_num())


def test_a_concept_no_different_from_its_noun_has_nothing_to_keep() -> None:
    likeness = torch.tensor([[0.5, torch.nan], [0.4, 0.9]])
    result = evaluate.RetentionReport(
        ["a", "b"], likeness, torch.tensor([0.495, 0.5]), torch.zeros(2), {}
    )
    assert result.kept[0].isnan()
    assert result.kept[1] == 1


def test_features_of_a_clip_in_a_folder(backbone: Backbone, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    embed = evaluate.features(backbone, tmp_path)
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    assert embed(pictures).shape == (3, 16)
    assert torch.allclose(embed(pictures)[1], embed(pictures[1:2])[0], atol=1e-5)
    with pytest.raises(CheckpointError, match="can't be loaded as a CLIP vision model"):
        evaluate.features(backbone, tmp_path / "nowhere")
    latents = evaluate.features(replace(backbone, preset="sd1"), None)
    assert latents(pictures).shape == (3, 4 * 8 * 8)


def test_mistakes(taught: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no concept yet"):
        pipeline.evaluate(requests.EvaluateRequest(checkpoint, settings=QUICK, device="cpu"))
    save_concept(tmp_path / "wrong", 0)
    with pytest.raises(
        ConceptImagesError, match=r"named after a concept. Expected V1, V2; found wrong"
    ):
        pipeline.evaluate(
            requests.EvaluateRequest(taught[0], tmp_path, settings=QUICK, device="cpu")
        )


def test_the_stack_as_it_was(taught: tuple[Path, Path]) -> None:
    stack = store.open_stack(store.stack_path(taught[0]))
    first = stack.as_of(1)
    assert [r.token for r in first.records] == ["V1"]
    assert first.adapter is stack.pool[stack.records[0].id]
    assert [r.token for r in stack.records] == ["V1", "V2"]
    assert stack.as_of(5).adapter is stack.adapter
