"""Is a concept of an Anima learned better with vectors of its own than by a name in plain text?

    python benchmarks/second/names.py OUT/anima names.json [--concepts 6] [--steps 200] [--rate 1e-3]

in: a mini-Anima (`small.py`) - out: a line for each way: `gain` of development concepts
(sweeps/sweep.py), each learned alone by `retention`.

    plain    what the product does: T5's tokens and Qwen's are those of the word's text
    vectors  T5's tokens of the word are replaced by this many vectors, which start as the noun's
             and are learned with the LoRA; Qwen's stay. ComfyUI can be given them by a node of ours
             alone, as its tokens of T5 are whole numbers
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from comfy_continual_lora import pipeline, prepare, requests, stacktensors, store
from comfy_continual_lora.checkpoint import load
from comfy_continual_lora.checkpoint.anima import AnimaBackbone
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.emphasis import Text
from comfy_continual_lora.mentions import split
from comfy_continual_lora.mini import world
from comfy_continual_lora.settings import LearnSettings

sys.path.append(str(Path(__file__).parents[1] / "sweeps"))
import sweep


class _Vectors(AnimaBackbone):
    """An Anima whose words are vectors among the rows that the conditioner makes of T5's tokens."""

    words: Mapping[str, Tensor] = {}  # those of the prompts that are read now

    def word_start(self, noun: str, generator: torch.Generator, count: int = 1) -> Tensor:
        rows = self.conditioner.embed.weight[self.token_ids(noun)].mean(0).float().cpu()
        noise = torch.randn(count, len(rows), generator=generator)
        return rows + 0.1 * rows.std() * noise

    def encode_prompts(
        self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        with self._with(words):
            ids = [self._cut_ids(prompt) for prompt in prompts]
            with self._embedded():
                return self._encode([self._qwen_ids([Text(prompt)]) for prompt in prompts], ids)

    def padding(self, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
        with self._with(words):
            return super().padding(prompts, words)

    def second_word(self, prompt: str, token: str, words: Mapping[str, Tensor]) -> tuple[int, int]:
        with self._with(words):
            ids, first = self._cut_ids(prompt), self._numbers[token][0]
            return len(ids) - 1 - ids[::-1].index(first), len(ids)

    def _cut_ids(self, prompt: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(split(prompt, self.words)):
            ids += self._numbers[part] if number % 2 else self.token_ids(part)
        return [*ids[: self.positions - 1], self.tokenizer.eos_token_id]

    @property
    def _numbers(self) -> dict[str, list[int]]:
        """The numbers that stand for the vectors of each word."""
        start, numbers = self.conditioner.embed.num_embeddings, {}
        for word, vectors in self.words.items():
            numbers[word] = list(range(start, start + len(vectors)))
            start += len(vectors)
        return numbers

    @contextmanager
    def _with(self, words: Mapping[str, Tensor] | None) -> Iterator[None]:
        before, self.words = self.words, words or self.words
        yield
        self.words = before

    @contextmanager
    def _embedded(self) -> Iterator[None]:
        before: nn.Embedding = self.conditioner.embed
        vectors = [before.weight, *self.words.values()]
        self.conditioner.embed = _Rows(torch.cat([v.to(before.weight) for v in vectors]))
        yield
        self.conditioner.embed = before


class _Rows(nn.Module):
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids]


@contextmanager
def _ways(vectors: int) -> Iterator[None]:
    """Inside the block names have vectors, if there are any."""
    if not vectors:
        yield
        return
    with (
        mock.patch.object(load, "AnimaBackbone", _Vectors),
        mock.patch.object(prepare, "PLAIN_NAME_PRESETS", ()),
        mock.patch.object(stacktensors, "PLAIN_NAME_PRESETS", ()),
    ):
        yield


def gain(checkpoint: Path, concept: world.Concept, settings: LearnSettings) -> float:
    with tempfile.TemporaryDirectory() as folder:
        stack = Path(folder) / "stack.safetensors"
        pictures = world.save_pictures(concept, Path(folder) / "V1")
        request = requests.LearnRequest(
            checkpoint, pictures, "V1", concept.noun, settings, stack=stack, device="cpu"
        )
        pipeline.learn_concept(request)
        backbone: Backbone = load.load_backbone(checkpoint, device="cpu")
        learned = store.open_stack(stack)
        text = FrozenText(backbone, learned.tokens)
        return sweep.gain(backbone, learned.adapter, text, "V1", concept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare plain names with learned vectors.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--method", default="retention")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--vectors", default="0,1,4", help="0: a plain name")
    parser.add_argument("--token-rates", default="1e-3,1e-2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vectors in map(int, arguments.vectors.split(",")):
        for token_rate in map(float, arguments.token_rates.split(",")) if vectors else (0.0,):
            more: dict[str, Any] = {"vectors": vectors, "token_rate": token_rate} if vectors else {}
            settings = LearnSettings(
                method=arguments.method,
                rate=arguments.rate,
                steps=arguments.steps,
                batch=8,
                size=128,
                precision="fp32",
                **more,
            )
            with _ways(vectors):
                gains = [
                    gain(arguments.checkpoint, concept, settings)
                    for concept in sweep.sequence(arguments.concepts, 0)
                ]
            mean = sum(gains) / len(gains)
            rows.append(
                {
                    "vectors": vectors,
                    "token_rate": token_rate,
                    "rate": arguments.rate,
                    "gains": gains,
                    "mean": mean,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
