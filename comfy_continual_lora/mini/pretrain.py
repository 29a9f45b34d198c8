"""The recipe that made the mini-SD: one command, resumable, stage after stage.

    python -m comfy_continual_lora.mini.pretrain OUT --processes 2    # CPU: one thread a process
    python -m comfy_continual_lora.mini.pretrain OUT --device cuda

in: nothing (the world is drawn) - out: OUT/*.safetensors, the parts of the mini-SD, and
OUT/log.jsonl.

    pictures     64,000 captioned pictures of the world
    reader       the evaluator: a small CNN that reads shape, pattern, colours and background from
                 an image, trained on drawn images only
    clip         image and text tower, trained with a contrastive loss, and an attribute loss on
                 both; the text tower is the text encoder
    autoencoder  a slim TAESD, f = 8, 4 channels of unit variance
    latents      every picture encoded once
    features     every caption encoded once
    unet         predicts eps; scaled-linear betas, errors weighted as those of v, caption dropout
                 0.1, EMA
    pack         the shipped files

Each stage keeps a snapshot and resumes from it; a finished stage (OUT/<stage>.safetensors exists) is
skipped. The order of the data is a function of seed and step, so a resumed run sees what an
uninterrupted one would. To train a finished U-Net longer, remove OUT/unet.safetensors and raise
--unet-steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from . import stages, trainset, weights
from .training import Run, in_processes

STAGES = ("pictures", "reader", "clip", "autoencoder", "latents", "features", "unet", "pack")


def run_stage(stage: str, run: Run, args: argparse.Namespace) -> None:
    """Errors: KeyError for a stage that is not in `STAGES`."""
    match stage:
        case "pictures":
            path = run.out / "pictures.npy"
            if not path.exists():
                trainset.draw(path, args.processes)
                run.log(stage="pictures", count=trainset.PICTURES)
        case "autoencoder":
            train = partial(stages.train_autoencoder, run, args.autoencoder_steps)
            in_processes(train, args.processes, run.out, trainset.SEED)
        case "unet":
            train = partial(stages.train_unet, run, args.unet_steps)
            in_processes(train, args.processes, run.out, trainset.SEED)
        case "pack":
            weights.pack(run.out)
        case _:
            {
                "reader": stages.train_reader,
                "clip": stages.train_clip,
                "latents": stages.encode_latents,
                "features": stages.encode_captions,
            }[stage](run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make the mini-SD from scratch; run it again to resume where it stopped."
    )
    parser.add_argument("out", type=Path, help="folder for data, snapshots and results")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="CPU processes that draw pictures and train the large parts together",
    )
    parser.add_argument(
        "--autoencoder-steps",
        type=int,
        default=5000,
        help="autoencoder steps of 8 pictures per process",
    )
    parser.add_argument(
        "--unet-steps", type=int, default=9000, help="U-Net steps of 32 pictures per process"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with one process")
    parser.add_argument(
        "--continue-shipped",
        action="store_true",
        help="in an empty folder: train the shipped U-Net further, in the shipped latents",
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="which stages, in this order")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    run = Run(args.out, torch.device(args.device))
    if run.device.type != "cpu" and args.processes != 1:
        parser.error("--device other than cpu requires --processes 1")
    run.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(trainset.SEED)
    if args.continue_shipped and not (run.out / "clip.safetensors").exists():
        weights.unpack(run.out)
        (run.out / "unet.safetensors").rename(run.out / "unet.start.safetensors")
    for stage in args.stages.split(","):
        if not (run.out / f"{stage}.safetensors").exists():
            run_stage(stage, run, args)


if __name__ == "__main__":
    main()
