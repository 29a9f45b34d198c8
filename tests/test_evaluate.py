"""Stage 8: what a stack remembers of itself: the matrix, what it is measured against, and its
pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_learn import save_concept
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from comfy_continual_lora import (
    consolidation,
    evaluate,
    likeness,
    pipeline,
    report,
    requests,
    store,
)
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import CheckpointError, ConceptImagesError, StackError
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import EvaluateSettings, LearnSettings
from comfy_continual_lora.verdicts import RetentionReport

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


def test_without_pictures_it_compares_with_the_thumbnails(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    result = pipeline.evaluate(
        requests.EvaluateRequest(taught[0], settings=QUICK, device="cpu"), seen.append
    )
    assert result.names == ["V1 ball", "V2 teapot"]
    assert result.reference == ["thumbnail"] * 2
    assert result.own.isnan().all()
    assert result.likeness[0, 1].isnan()
    assert (result.likeness.diagonal() < 1).all()
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
    lines = result.summary().splitlines()
    assert [line.split(":")[0] for line in lines[4:]] == ["V1 ball", "V2 teapot", "In all"]


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
    result = _report(likeness, floor=[0.495, 0.5], own=[0.9, 0.9])
    assert result.kept[0].isnan()
    assert result.kept[1] == 1
    # what a blob once got: 100 % of nothing, in green
    assert result.grades == ["floor", "well"]
    assert result.shade(0, 0) < 0.1
    assert result.verdicts[0].startswith("a: not learned")
    assert "learned again" in result.verdict


def _report(
    likeness: torch.Tensor, floor: list[float], own: list[float], reference: str = "pictures"
) -> RetentionReport:
    count = len(floor)
    return RetentionReport(
        [chr(ord("a") + j) for j in range(count)],
        likeness,
        torch.tensor(floor),
        torch.zeros(count),
        {},
        torch.tensor(own),
        torch.full((count,), 0.01),
        [reference] * count,
    )


@pytest.mark.parametrize(
    ("learned", "now", "grade", "said"),
    [
        (0.86, 0.85, "well", "In all: good."),
        (0.75, 0.75, "partly", "In all: fair. More steps .* a"),  # a blob of one of its colours
        (0.86, 0.51, "floor", "a has to be learned again"),
        (0.515, 0.515, "floor", "a has to be learned again"),
        (0.65, 0.65, "floor", "a has to be learned again"),
        (0.99, 0.76, "partly", "fair. a faded"),
    ],
)
def test_verdicts(learned: float, now: float, grade: str, said: str) -> None:
    matrix = torch.tensor([[learned, torch.nan], [now, 0.9]])
    result = _report(matrix, floor=[0.5, 0.5], own=[0.9, 0.9])
    assert result.grades == [grade, "well"]
    assert re.search(said, result.verdict)
    forgotten = result.verdicts[0].startswith("a: forgotten")
    assert forgotten == (grade == "floor" and learned > 0.7)


def test_a_thumbnail_says_how_near_it_is_at_least() -> None:
    matrix = torch.tensor([[0.78, torch.nan], [0.78, 0.96]])
    result = _report(matrix, [0.5, 0.5], [torch.nan, torch.nan], reference="thumbnail")
    assert result.near.tolist() == pytest.approx([0.56, 0.92])
    assert result.grades == ["partly", "well"]
    assert "at least in part" in result.verdicts[0]
    assert "all your pictures" in result.verdict


def test_what_only_it_has_drawn_is_no_proof() -> None:
    matrix = torch.tensor([[1.0]])
    result = _report(matrix, floor=[0.5], own=[torch.nan], reference="drawn")
    assert result.grades == ["unknown"]
    assert "not known" in result.verdicts[0]
    assert "give your pictures" in result.verdict


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
    assert embed(pictures, "").shape == (3, 16)
    assert torch.allclose(embed(pictures, "")[1], embed(pictures[1:2], "")[0], atol=1e-5)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        for content in (b"", b"[]"):
            whole = (tmp_path / file).read_bytes()
            (tmp_path / file).write_bytes(content)
            with pytest.raises(CheckpointError, match="can't be loaded as a CLIP vision model"):
                evaluate.features(backbone, tmp_path)
            (tmp_path / file).write_bytes(whole)
    for folder in (tmp_path / "nowhere", tmp_path / "config.json", "openai/clip"):
        with pytest.raises(CheckpointError, match="There is no folder"):
            evaluate.features(backbone, Path(folder))


def test_features_are_kept_if_the_user_wants_that(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    settings = LearnSettings(method="lora", steps=2, batch=2, rank=2, size=64)
    plain, kept = (learned(replace(settings, keep_features=keep), "V1") for keep in (False, True))
    records = [store.read_records(store.stack_path(path))[0] for path in (plain, kept)]
    assert records[0].features == ""
    seen = likeness.unpacked(records[1].features)
    assert seen is not None
    assert len(seen) == len(list(folders["V1"].glob("*.png"))) == 2
    tensors = [store.open_stack(store.stack_path(path)).adapter or {} for path in (plain, kept)]
    assert all(torch.equal(tensors[0][key], value) for key, value in tensors[1].items())
    result = pipeline.evaluate(requests.EvaluateRequest(kept, settings=QUICK, device="cpu"))
    assert result.reference == ["features"]
    assert not result.own.isnan().any()
    own = pipeline.evaluate(
        requests.EvaluateRequest(kept, folders["V1"].parent, settings=QUICK, device="cpu")
    )
    assert own.reference == ["pictures"]


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
    first = consolidation.as_of(stack, 1)
    assert [r.token for r in first.records] == ["V1"]
    assert first.adapter is stack.pool[stack.records[0].id]
    assert [r.token for r in stack.records] == ["V1", "V2"]
    assert consolidation.as_of(stack, 5).adapter is stack.adapter
