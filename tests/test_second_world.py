"""The second miniature: its world says what it draws, a third of its words is in no protected list,
and a checkpoint of its nets is one of SD1.x's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import anima
import dataset
import nets
import numpy as np
import pack
import photographs
import places
import pytest
import subjects
import things
import torch
import world
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from comfy_continual_lora import textspace
from comfy_continual_lora.checkpoint.load import load_backbone

LISTED = " ".join(
    (*textspace.THINGS, *textspace.COLORS, *textspace.SURFACES, *textspace.PLACES)
    + textspace.DETAILS
).split()


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (things.SHAPES, 48),
        (things.COLORS, 24),
        (things.KINDS, 12),
        ([phrase.split()[-1] for phrase in places.PHRASES.values()], 24),
    ],
    ids=["nouns", "colours", "patterns and materials", "places"],
)
def test_a_third_of_the_words_of_each_kind_is_in_no_list(
    words: Collection[str], least: int
) -> None:
    assert len(set(words)) == len(words) >= least
    assert 3 * len([word for word in words if word not in LISTED]) >= len(words)


def test_a_plain_caption_names_all_that_its_labels_say() -> None:
    scenes = [dataset.scene(0, index)[0] for index in range(400)]
    assert Counter(scene.arrangement for scene in scenes).keys() == set(world.ARRANGEMENTS)
    assert Counter(scene.style for scene in scenes).keys() == set(world.STYLES)
    labels, plain = dataset.labels(scenes), 0
    assert {name: len(values) for name, values in labels.items()} == dict.fromkeys(
        dataset.SIZES, len(scenes)
    )
    for number, scene in enumerate(scenes):
        if not scene.plain:
            continue
        plain += 1
        assert scene.caption.endswith(places.PHRASES[scene.place])
        for slot, thing in zip("ab", scene.things, strict=False):
            noun = list(things.SHAPES)[int(labels[f"noun_{slot}"][number])]
            kind = things.KINDS[int(labels[f"kind_{slot}"][number])]
            assert noun == thing.look.shape
            assert noun in scene.caption
            assert kind in scene.caption or kind == "plain"
            named = labels[f"colors_{slot}"][number].bool()
            colors = [name for name, is_one in zip(things.COLORS, named, strict=True) if is_one]
            assert len(colors) == things.colors_of(kind)
            assert all(color in scene.caption for color in colors)
        if len(scene.things) == 1:
            assert int(labels["noun_b"][number]) == -1
    assert plain > 100


def test_the_first_named_thing_is_drawn_where_its_relation_says() -> None:
    """A red ball and a blue one, in every relation: where the red is."""
    rng = np.random.default_rng(0)
    red, blue = (
        world.Thing(world.Look("ball", "plain", (color, color, color)), (name,))
        for name, color in (("red", things.COLORS["red"]), ("blue", things.COLORS["blue"]))
    )
    middle = {}
    for relation in world.RELATIONS:
        scene = world.Scene((red, blue), relation, "snow", "drawing", "", plain=True)
        picture = world.draw_scene(scene, rng).astype(int)
        own = [picture[..., channel] - picture.sum(-1) / 3 > 60 for channel in (0, 2)]  # red, blue
        middle[relation] = [np.argwhere(mask).mean(0) for mask in own]
        areas = [mask.sum() for mask in own]
        if relation == "front":
            assert areas[0] > 0.95 * areas[1] * (31 / 36) ** 2  # nothing hides the one in front
    (red_at, blue_at) = middle["beside"]
    assert red_at[1] < blue_at[1] - 40
    (red_at, blue_at) = middle["on"]
    assert red_at[0] < blue_at[0] - 30


@pytest.mark.parametrize("name", places.PHRASES)
def test_every_place_is_drawn_the_same_for_the_same_seed(name: str) -> None:
    pictures = [places.draw_place(name, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert pictures[0].shape == (128, 128, 3)
    assert pictures[0].std() > 3  # something is to be seen
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_concepts_are_what_the_world_never_draws() -> None:
    development, reporting, pairs = (world.concepts(split) for split in world.SPLITS)
    assert len(development) == len(reporting) == 200
    every = [*development, *reporting, *pairs]
    assert len({concept.name for concept in every}) == len(every)
    assert len({concept.look for concept in every}) == len(every)
    assert {concept.look.pattern for concept in every}.isdisjoint(things.KINDS)
    assert all(a.noun == b.noun for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert world.concepts("development") == development
    first, again = (list(world.concept_pictures(development[3], 3)) for _ in range(2))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[0], first[1])


def test_every_caption_can_be_encoded() -> None:
    vocabulary = nets.Vocabulary()
    captions = ["", *(dataset.scene(1, index)[0].caption for index in range(300))]
    ids = vocabulary.encode(captions)
    assert ids.shape == (301, 77)
    assert (ids[:, -1] == vocabulary.end).all()  # none is cut off
    assert int(ids.max()) == vocabulary.end == len(vocabulary.tokens) - 1


def test_the_benchmark_takes_the_photographs(tmp_path: Path) -> None:
    photographs.write(tmp_path, "pairs", 4, 8)
    found = subjects.of_folder(tmp_path, 0, 128)
    assert {subject.name: subject.noun for subject in found} == {
        concept.name: concept.noun for concept in world.concepts("pairs")[:4]
    }
    assert found[0].learned_from().shape == (6, 3, 128, 128)
    assert found[0].real(9).shape == (2, 3, 128, 128)


def test_the_reader_is_right_where_all_of_it_is() -> None:
    scenes = [dataset.scene(0, index)[0] for index in range(60)]
    labels = dataset.labels(scenes)
    logits = {}
    for name, size in dataset.SIZES.items():
        target = labels[name]
        perfect = (
            torch.nn.functional.one_hot(target.clamp(min=0), size) if target.dim() == 1 else target
        )
        logits[name] = perfect.float()
    right = nets.is_right(logits, labels)
    assert all(values.nanmean() == 1 for values in right.values())
    assert right["noun_b"].isnan().any()
    off_by_one = {name: values.roll(1, 1) for name, values in logits.items()}
    assert all(values.nanmean() < 0.2 for values in nets.is_right(off_by_one, labels).values())


@pytest.mark.slow
def test_its_checkpoint_is_read_as_sd1_and_its_clip_by_transformers(tmp_path: Path) -> None:
    """With random weights."""
    torch.manual_seed(0)
    parts = {
        "unet": nets.new_unet(),
        "autoencoder": nets.new_autoencoder(),
        "clip": nets.new_clip(len(nets.Vocabulary().tokens)),
    }
    for name, part in parts.items():
        save_file(part.state_dict(), tmp_path / f"{name}.safetensors")
    pack.write_checkpoint(tmp_path)
    backbone = load_backbone(tmp_path / "second.safetensors", device="cpu", precision="fp32")
    assert (backbone.preset, backbone.word_width) == ("mini", nets.TEXT_WIDTH)
    caption = "a photo of two red balls in the library"
    ids = nets.Vocabulary().encode([caption])
    noisy, timestep = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        features = parts["clip"].text_model(input_ids=ids).last_hidden_state
        wanted = parts["unet"](noisy, timestep, features).sample
        given = backbone.predict(noisy, timestep, backbone.encode_prompts([caption]))
    assert torch.allclose(given, wanted, atol=2e-3 * float(wanted.abs().max()))
    (latent,) = backbone.encode_images(torch.zeros(1, 3, 128, 128))
    assert latent.shape == (4, 16, 16)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        theirs = clip.text_model(
            **tokens([caption], padding="max_length", return_tensors="pt")
        ).pooler_output
        ours = parts["clip"].text_model(input_ids=ids).pooler_output
    assert torch.allclose(theirs, ours, atol=1e-5)


@pytest.mark.slow
def test_its_twin_is_read_as_sdxl(tmp_path: Path) -> None:
    """With random weights: two encoders, pooled text, sizes, v."""
    torch.manual_seed(0)
    vocabulary = nets.Vocabulary()
    clips = [nets.new_clip(len(vocabulary.tokens), openclip=second) for second in (False, True)]
    unet = nets.new_unet(twin=True)
    parts = {
        "unet2": unet,
        "autoencoder": nets.new_autoencoder(),
        "clip": clips[0],
        "clip2": clips[1],
    }
    for name, part in parts.items():
        save_file(part.state_dict(), tmp_path / f"{name}.safetensors")
    pack.write_twin(tmp_path)
    backbone = load_backbone(tmp_path / "twin.safetensors", device="cpu", precision="fp32")
    assert (backbone.prediction, len(backbone.text_encoders)) == ("v_prediction", 2)
    caption = "a photo of a red ball in the library"
    ids = vocabulary.encode([caption])
    noisy, timestep = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        features, added = nets.Texts(clips).eval()(ids)
        wanted = unet(noisy, timestep, features, added_cond_kwargs=added).sample
        encoded = backbone.encode_prompts([caption])
        given = backbone.predict(noisy, timestep, encoded)
    size = float(features.abs().max())
    assert torch.allclose(backbone.context(encoded), features, atol=2e-3 * size)
    assert torch.allclose(given, wanted, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.slow
def test_its_anima_is_read_as_any(tmp_path: Path) -> None:
    """With random weights: the folder's text features and its net's answer are those it was trained
    with.
    """
    torch.manual_seed(0)
    captions = [dataset.scene(0, index)[0].caption for index in range(200)]
    anima.write_tokenizers(tmp_path / "anima", captions)
    tokens = anima.Tokens(tmp_path / "anima", [captions[0], ""])
    sizes = anima.Sizes(language=2, conditioner=2, net=4)
    language = anima.new_language(tokens.qwen_words, sizes).model.eval()
    flow, vae = anima.Flow(tokens.t5_words, sizes).eval(), anima.new_vae().eval()
    for name, part in (("language", language), ("flow", flow), ("vae16", vae)):
        save_file(part.state_dict(), tmp_path / f"{name}.safetensors")
    mean, deviation = torch.linspace(-1, 1, 16), torch.linspace(1, 3, 16)
    save_file({"mean": mean, "deviation": deviation}, tmp_path / "latents16.safetensors")
    anima.write_folder(tmp_path, sizes)
    backbone = load_backbone(tmp_path / "anima", device="cpu", precision="fp32")
    assert (backbone.preset, backbone.word_width) == ("anima", anima.WIDTH)
    noisy, share = torch.randn(2, 16, 16, 16), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        states = language(tokens.qwen.ids).last_hidden_state
        wanted, _ = flow(noisy, share, states, tokens.qwen.mask, tokens.t5)
        features = backbone.encode_prompts([captions[0], ""])
        given = backbone.predict(noisy, 1000 * share, features)
    assert features.shape == (2, anima.POSITIONS, anima.WIDTH)
    assert torch.allclose(given, wanted, atol=2e-2 * float(wanted.abs().max()))  # bfloat16
    picture = torch.rand(3, 128, 128) * 2 - 1
    (latent,) = backbone.encode_images([picture])
    with torch.no_grad():
        own = vae.encode(picture[None, :, None]).latent_dist.mean[0, :, 0]
    own = (own - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(latent, own, atol=2e-2 * float(own.abs().max()))
