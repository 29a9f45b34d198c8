"""Write concepts of the second world as folders of photographs, as `retention/run.py --concepts` takes
them (CustomConcept101's layout).

    python benchmarks/second/photographs.py FOLDER --split development --count 6 --pictures 15

in: nothing - out: FOLDER/<concept>/0.png ..., FOLDER/dataset.json with their class nouns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import world
from PIL import Image


def write(folder: Path, split: str, count: int, pictures: int) -> None:
    """The first `count` concepts of a split; every third picture is held out by the benchmark."""
    chosen = world.concepts(split)[:count]
    for concept in chosen:
        own = folder / concept.name
        own.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(world.concept_pictures(concept, pictures)):
            Image.fromarray(picture).save(own / f"{number}.png")
    nouns = [
        {"instance_data_dir": f"./{concept.name}", "class_prompt": f"photo of a {concept.noun}"}
        for concept in chosen
    ]
    (folder / "dataset.json").write_text(json.dumps(nouns, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write concepts as folders of photographs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=world.SPLITS, default="development")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=8, help="of each, at most 26")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.split, arguments.count, arguments.pictures)


if __name__ == "__main__":
    main()
