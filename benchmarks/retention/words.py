"""Words and prompts that no method protects: what the benchmark measures leaks on.

Some nouns, colours and places of the mini-SD's world are left out: `without` takes them out of the
lists that `textspace` protects, and prompts with them out of the sample of `language`. WRITTEN and
HELD_OUT_FORMS are prompts as people write them, from words that are in no list of the project.

    leak = mean over layers of  E || delta c ||^2 / E || W0 c ||^2     over the prompts given
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from comfy_continual_lora import language, targets, textspace
from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import world

LEFT_OUT = {"nouns": 8, "colors": 4, "places": 5}
CAPTIONS = 400
FORMS = ("a photo of a {}", "photo of a {}", "a picture of a {}", "a {}")
LISTED_PATTERNS = ("striped", "dotted", "checkered")
OTHER_PATTERNS = ("split", "ringed")  # in no list

# {} is the concept, [] a place
HELD_OUT_FORMS = (
    "look what I found: {} []!",
    "{}, spotted [] this morning",
    "my own {} []",
    "who left this {} []?",
    "another {} []",
    "[], there it is: {}",
)
# those of them that the bare mini-SD draws rightly; it loses the shape where a word that it never saw
# ends the prompt (mini/behind.py)
READ_BY_THE_MINI = tuple(HELD_OUT_FORMS[n] for n in (0, 2, 4, 5))
# places for photographs; the world's own are for its concepts
UNLISTED_PLACES = (
    "on a kitchen counter",
    "below a lighthouse",
    "under an umbrella",
    "inside a cardboard crate",
    "along the railway",
    "by a swimming pool",
    "atop a pile of laundry",
    "among tulips",
)
WRITTEN = (
    "grandmother knitting while it pours",
    "an abandoned carousel overgrown with ivy",
    "firefighters resting after their shift, candid",
    "jellyfish drifting past a drowned cathedral",
    "my nephew's lemonade stall, disposable camera",
    "a locomotive crossing the viaduct at dawn",
    "steam rising off freshly baked croissants",
    "two pensioners arguing over dominoes",
    "a violin maker in his workshop, tungsten lamp",
    "lightning over wheat, storm chaser footage",
    "an astronaut watering tomatoes",
    "rusty tractor, Ektachrome",
    "a clown asleep aboard the last tram",
    "blueprint of an imaginary submarine",
    "kids racing shopping trolleys downhill",
    "an octopus juggling porcelain saucers",
    "bioluminescent plankton washing ashore",
    "a beekeeper lifting honeycomb, unsharp",
    "neon noodle bar in Osaka, drizzle",
    "a dragon curled around a skyscraper",
    "marble bust wearing headphones",
    "harbour cranes at sunset, telephoto",
    "a wedding dance inside a barn",
    "fossil of an unknown reptile, museum label",
)


@dataclass(frozen=True)
class Words:
    nouns: Sequence[str]
    colors: Sequence[str]
    places: Sequence[str]
    patterns: Sequence[str]

    @property
    def all(self) -> list[str]:
        return [*self.nouns, *self.colors, *self.places]


def split(nouns: Sequence[str], seed: int) -> tuple[Words, Words]:
    """The words that stay in the lists, and those left out; these class nouns stay."""
    rng = np.random.default_rng(100 + seed)
    kinds = {
        "nouns": list(world.SHAPES),
        "colors": list(world.COLORS),
        "places": list(world.BACKGROUNDS.values()),
    }
    out = {}
    for kind, words in kinds.items():
        free = [word for word in words if word not in nouns]
        out[kind] = [str(word) for word in rng.permutation(free)[: LEFT_OUT[kind]]]
    stay = {kind: [w for w in words if w not in out[kind]] for kind, words in kinds.items()}
    return Words(**stay, patterns=LISTED_PATTERNS), Words(**out, patterns=OTHER_PATTERNS)


@contextmanager
def without(words: Sequence[str]) -> Iterator[None]:
    """While inside, neither the lists nor the sample of language have these words."""

    def sample(tokenizer: Any) -> list[str]:
        prompts = language.language_prompts(tokenizer)
        return [prompt for prompt in prompts if not any(word in prompt for word in words)]

    lists: dict[str, Any] = {
        name: tuple(word for word in getattr(textspace, name) if word not in words)
        for name in ("THINGS", "COLORS", "PLACES")
    }
    with (
        mock.patch.multiple(textspace, **lists),
        mock.patch.object(targets, "language_prompts", sample),
    ):
        yield


def captions(words: Words, count: int = CAPTIONS) -> list[str]:
    """As the world writes them, of one thing or two."""
    rng = np.random.default_rng(7)
    made = []
    for _ in range(count):
        look = str(rng.choice(words.colors))
        if rng.random() < 0.5:
            look += f" and {rng.choice(words.colors)} {rng.choice(words.patterns)}"
        text = FORMS[rng.integers(len(FORMS))].format(f"{look} {rng.choice(words.nouns)}")
        if rng.random() < 0.3:
            text += f" and a {rng.choice(words.colors)} {rng.choice(words.nouns)}"
        made.append(f"{text} {rng.choice(words.places)}")
    return made


def leak(backbone: Backbone, adapter: Adapter | None, moment: Tensor) -> float:
    if adapter is None:
        return 0.0
    there = {name: tensor.to(moment.device) for name, tensor in adapter.items()}
    return float(textspace.drift(there, None, moment, textspace.sizes(backbone, moment)))
