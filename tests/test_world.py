"""The world is a function of its seed, and its concepts are not in it."""

from __future__ import annotations

import numpy as np
import pytest

from comfy_continual_lora.mini import parts, world


def test_a_scene_is_a_function_of_its_seed() -> None:
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(5)
        scene = world.random_scene(rng)
        pictures.append((scene.caption, world.draw_scene(scene, rng)))
    assert pictures[0][0] == pictures[1][0]
    assert np.array_equal(pictures[0][1], pictures[1][1])


def test_captions_say_what_is_drawn_and_every_word_has_a_trained_vector() -> None:
    rng = np.random.default_rng(1)
    scenes = [world.random_scene(rng) for _ in range(300)]
    # raises KeyError for a word without a vector
    parts.Vocabulary().encode([scene.caption for scene in scenes])
    for scene in scenes:
        assert [t.look.shape for t in scene.things] == [
            w for w in scene.caption.split() if w in world.SHAPES
        ]
    assert {len(s.things) for s in scenes} == {1, 2}


def test_concepts_are_ones_the_world_does_not_contain() -> None:
    by_split = {split: world.concepts(split) for split in world.SPLITS}
    names = [c.name for concepts in by_split.values() for c in concepts]
    assert len(set(names)) == 30 * len(world.SPLITS)
    for concepts in by_split.values():
        assert len(concepts) == 30
        assert all(
            c.noun in world.SHAPES and c.look.pattern not in world.PATTERNS for c in concepts
        )
    assert by_split["reporting"] == world.concepts("reporting")


def test_concept_pictures_are_reproducible_and_differ() -> None:
    concept = world.concepts("reporting")[3]
    first, again = (np.stack(list(world.concept_pictures(concept, 5))) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (5, 128, 128, 3)
    assert all(np.abs(first[0].astype(int) - other).mean() > 5 for other in first[1:])


@pytest.mark.parametrize("pattern", [*world.PATTERNS, *world.CONCEPT_PATTERNS])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_and_pattern_draws(shape: str, pattern: str) -> None:
    picture = np.zeros((128, 128, 3), np.float32)
    look = world.Look(
        shape, pattern, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), eyes=True, extra="hat"
    )
    world.draw_look(picture, look, (64, 64), 40, np.random.default_rng(0))
    covered = (picture.max(-1) > 60).mean()
    assert 0.05 < covered < 0.6
