"""The benchmark's own judges: trained once and the same every time, and what they say of pictures
means what its name says.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import judges
import numpy as np
import pytest
import torch
from judgepictures import SEED, labels, random_look
from judgequality import collapse, retrieval
from judges import Budget, Judges, load_judges, train
from torch import Tensor, nn

from comfy_continual_lora import metrics
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.mini.looks import PAINTS, SHAPES, Look

pytestmark = pytest.mark.slow
TINY = Budget(scenes=16, encoder_steps=2, attribute_steps=2, batch=8)
CONCEPT = world.concepts("development", 1)[0]  # in zigzag, which shows two of its three colours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    load_judges(folder, TINY)
    return folder


def real_pictures(concept: world.Concept, count: int) -> Tensor:
    return trainset.to_tensor(np.stack(list(world.concept_pictures(concept, count, seed=1))))


def test_training_gives_the_same_judges_and_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = train(TINY).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    loaded = load_judges(folder).state_dict()
    assert loaded.keys() == again.keys()
    assert all(torch.equal(loaded[key], again[key]) for key in again)


def test_more_training_gives_other_judges(folder: Path) -> None:
    longer = train(TINY._replace(encoder_steps=3)).state_dict()
    loaded = load_judges(folder).state_dict()
    assert not torch.equal(longer["encoder.body.0.weight"], loaded["encoder.body.0.weight"])


def test_they_are_trained_once_however_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Budget] = []

    def slowly(budget: Budget) -> Judges:
        calls.append(budget)
        time.sleep(0.2)
        return Judges()

    monkeypatch.setattr(judges, "train", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load_judges, [tmp_path] * 2)
    third = load_judges(tmp_path)
    assert calls == [Budget()]
    for other in (second, third):
        assert torch.equal(other.encoder.body[0].weight, first.encoder.body[0].weight)


def test_shapes_and_that_a_picture_is_judged_alone(folder: Path) -> None:
    loaded = load_judges(folder)
    pictures = real_pictures(CONCEPT, 3)
    features = loaded.features(pictures)
    assert features.shape == (3, 256)
    assert torch.allclose(loaded.features(pictures[1:2]), features[1:2], atol=1e-4)
    agreement = loaded.agreement(pictures, CONCEPT)
    assert {key: values.shape for key, values in agreement.items()} == dict.fromkeys(
        ("shape", "pattern", "colors"), (3,)
    )
    assert set(torch.cat([agreement["shape"], agreement["pattern"]]).tolist()) <= {0.0, 1.0}


class Says(nn.Module):
    """A reader that says the same of every picture."""

    def __init__(self, shape: str, pattern: str, colors: Tensor) -> None:
        super().__init__()
        self.read = {
            "shape": torch.eye(len(SHAPES))[[list(SHAPES).index(shape)]],
            "pattern": torch.eye(len(PAINTS))[[list(PAINTS).index(pattern)]],
            "colors": colors / 127.5 - 1,
        }

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {
            key: value.expand(len(pictures), *value.shape[1:]) for key, value in self.read.items()
        }


def test_agreement_counts_shape_pattern_and_the_colours_that_show() -> None:
    judged, pictures = Judges().eval(), torch.zeros(70, 3, 128, 128)
    off = torch.tensor([[[30.0, 40.0, 0.0], [0.0, 0.0, 10.0], [200.0, 200.0, 200.0]]])
    judged.attributes = Says(CONCEPT.noun, "plaid", torch.tensor([CONCEPT.look.colors]) + off)  # type: ignore[assignment]
    agreement = judged.agreement(pictures, CONCEPT)
    assert agreement["shape"].tolist() == [1.0] * 70
    assert agreement["pattern"].tolist() == [0.0] * 70
    # 50 and 10; the third colour does not show
    assert torch.allclose(agreement["colors"], torch.full((70,), 30.0), atol=1e-3)
    other = next(noun for noun in SHAPES if noun != CONCEPT.noun)
    judged.attributes = Says(other, "zigzag", torch.zeros(1, 3, 3))  # type: ignore[assignment]
    agreement = judged.agreement(pictures, CONCEPT)
    assert (float(agreement["shape"].sum()), float(agreement["pattern"].sum())) == (0.0, 70.0)


def test_a_colour_that_is_read_is_one_of_the_picture(folder: Path) -> None:
    color = torch.tensor([0.5, -0.25, 0.125])
    read = load_judges(folder).attributes(color.view(1, 3, 1, 1).expand(2, 3, 64, 64))
    assert torch.allclose(read["colors"], color.expand(2, 3, 3), atol=1e-5)


def test_every_shape_and_pattern_is_drawn_and_labelled() -> None:
    rng = np.random.default_rng(SEED)
    looks = [random_look(rng) for _ in range(600)]
    assert {look.shape for look in looks} == set(SHAPES)
    assert {look.pattern for look in looks} == set(PAINTS)
    true = labels(looks)
    assert set(true["extra"].tolist()) == {0, 1, 2}


def test_a_colour_counts_where_it_is_seen() -> None:
    color = (10, 20, 30)
    looks = [
        Look("ball", "plain", (color,) * 3),
        Look("ball", "zigzag", (color,) * 3),
        Look("ball", "quartered", (color,) * 3),
        Look("sneaker", "quartered", (color,) * 3),  # which has little at the top right
    ]
    assert labels(looks)["shown"].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
        [True, False, True],
    ]


def test_retrieval_is_one_for_tight_concepts_and_chance_for_none() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(40, 1, 64, generator=generator)
    noise = torch.randn(40, 8, 64, generator=generator)
    assert retrieval(means + 0.1 * noise) == 1.0
    assert retrieval(noise) < 0.1


def test_lost_variety_shows_in_the_gaussian_kernel_only() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 1, 256, generator=generator)
    features = features + 0.6 * torch.randn(6, 32, 256, generator=generator)
    seen, missed = collapse(features, Judges().kernel), collapse(features, metrics.quadratic)
    assert seen["shrunk"] > 10 * abs(seen["real"])
    assert abs(missed["shrunk"]) < 1e-3


def test_a_trained_judge_tells_right_pictures_from_wrong_ones(tmp_path: Path) -> None:
    # a sixth of the training: shapes are learned by then, seven patterns in ten
    trained = load_judges(tmp_path, Budget(1500, 150, 550, batch=64))
    own, others = [], []
    learned = world.concepts("development", 8)
    for concept, other in zip(learned, [*learned[1:], learned[0]], strict=True):
        pictures = real_pictures(concept, 10)
        own.append(trained.agreement(pictures, concept))
        others.append(trained.agreement(pictures, other))
    for key, least in {"shape": 0.95, "pattern": 0.6}.items():
        assert torch.cat([agreement[key] for agreement in own]).mean() > least
        assert torch.cat([agreement[key] for agreement in others]).mean() < 0.2
    right = torch.cat([agreement["colors"] for agreement in own]).mean()
    wrong = torch.cat([agreement["colors"] for agreement in others]).mean()
    assert right < 0.5 * wrong
    features = trained.features(torch.cat([real_pictures(concept, 8) for concept in learned]))
    assert retrieval(features.unflatten(0, (8, 8))) > 0.6
