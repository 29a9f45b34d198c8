"""Front end: the command `continual-lora`.

It builds a request, shows progress, translates our exceptions, shows the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import textwrap
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from .errors import Cancelled, ContinualLoraError, SettingError
from .progress import Progress
from .settings import (
    FORMATS,
    ConsolidateSettings,
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    said,
    suiting,
)

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes (`parallel`) one speaks
EPILOG = (
    "Everything learned about a checkpoint lies in one file beside it: "
    "<checkpoint>.concepts.safetensors. Nothing is ever downloaded."
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (one paragraph says what to do), 130 stopped with
    Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    bar = _Bar()
    try:
        with nullcontext() if FIRST else redirect_stdout(io.StringIO()):
            arguments.run(arguments, bar)
            sys.stdout.flush()
    except ContinualLoraError as error:
        bar.clear()
        print(
            "\n".join(
                textwrap.fill(line, 110, break_long_words=False, break_on_hyphens=False)
                for line in f"continual-lora: {error}".splitlines()
            ),
            file=sys.stderr,
        )
        return 2
    except Cancelled as stopped:
        bar.clear()
        print(f"continual-lora: stopped. {stopped}", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # the reader has left, as `| head` does; what is left to write at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        bar.close()
    return 0


# --- progress
# --------------------------------------------------------------------------------------------------


class _Bar:
    """Progress on one line of a terminal, or a line now and then elsewhere; Ctrl-C stops between
    two steps, a second one at once.
    """

    def __init__(self) -> None:
        self.stop, self.width, self.said = False, 0, -1
        self.before = signal.signal(signal.SIGINT, self._interrupt) if _in_main_thread() else None

    def _interrupt(self, _number: int, _frame: object) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def __call__(self, progress: Progress) -> None:
        if self.stop:
            kept = (
                " What was learned so far is kept: the same command goes on from here."
                if progress.stage in ("learn", "calibrate", "consolidate", "fisher")
                else ""
            )
            raise Cancelled(f"({progress.stage}, step {progress.step} of {progress.steps}){kept}")
        if not FIRST:
            return
        if progress.note:
            self.clear()
            print(f"continual-lora: {progress.note}", file=sys.stderr, flush=True)
        line = f"{progress.stage:>11} {progress.step}/{progress.steps}"
        if progress.loss is not None:
            line += f"  loss {progress.loss:.4f}  rate {progress.rate:.2g}"
        if progress.seconds_left is not None:
            line += (
                f"  {int(progress.seconds_left) // 60}:{int(progress.seconds_left) % 60:02d} left"
            )
        if sys.stderr.isatty():
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(line)
        elif progress.step == progress.steps or progress.step * 10 // progress.steps != self.said:
            self.said = progress.step * 10 // progress.steps
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
            self.width = 0

    def close(self) -> None:
        self.clear()
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


# --- the commands
# --------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace, bar: _Bar) -> None:
    from .demo import run_demo

    report = run_demo(arguments.out, bar, lambda text: (bar.clear(), print(text, flush=True)))
    print(f"The report: {report}")


def _mini(arguments: argparse.Namespace, bar: _Bar) -> None:
    from .mini.weights import write_checkpoint

    write_checkpoint(arguments.path, stock=arguments.stock)
    print(f"Wrote {arguments.path} ({arguments.path.stat().st_size / 2**20:.0f} MiB)")


def _learn(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline
    from .imagefile import check_output, save_own

    settings = LearnSettings(**_given(arguments, LearnSettings))
    request = pipeline.LearnRequest(
        arguments.checkpoint,
        arguments.images,
        arguments.token,
        arguments.noun,
        settings,
        arguments.replace,
        **_where(arguments),
    )
    if arguments.plan:
        return _plan(arguments, dataclasses.asdict(pipeline.plan(request)))

    preview = (
        request.stack_file.parent
        / f"{arguments.checkpoint.stem}.{Path(arguments.token).name}.preview.png"
    )
    if settings.preview_every:
        check_output(preview)

    def show(progress: Progress) -> None:
        if progress.preview is not None:
            save_own(progress.preview, preview)
        bar(progress)

    result = pipeline.learn_concept(request, show)
    bar.clear()
    if arguments.json:
        print(
            json.dumps(
                {
                    "token": result.record.token,
                    "loss": result.record.loss,
                    "stack_file": str(result.stack_file),
                }
            )
        )
    else:
        print(
            f"Learned {result.record.token} ({result.record.noun}) from {result.record.images} "
            f"pictures; stored in {result.stack_file}"
        )
        print(
            f'Try: continual-lora draw --checkpoint {arguments.checkpoint} --prompt "a photo of a '
            f'{result.record.token} {result.record.noun}"'
        )


def _plan(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(found))
        return

    def line(name: str, size: int, note: str = "") -> None:
        print(f"  {name:<36} {size / 1e6:>9,.0f} MB  {note}".rstrip())

    waits = "" if found["device"] == "cpu" else "in main memory while it learns"
    print(
        f"{found['family']}, {found['size']} x {found['size']} pixels, {found['rows']} at once, "
        f"on {found['device']}. Memory, at least:"
    )
    for name, (size, number) in found["weights"].items():
        line(name, size, f"{number} {waits if name == 'VAE' else ''}")
    line("adapter and word", found["learned"])
    line("their gradients and optimizer", found["optimizer"])
    line("activations", found["activations"])
    line(
        "peak",
        found["peak"],
        "" if found["device"] == "cpu" else "and what the driver takes for itself",
    )
    print("Files:")
    line("stack", found["stack_file"], "and the version before it")
    line("exported LoRA and embedding", found["exported"])
    least, most = found["seconds"]
    unit, size = (
        ("hours", 3600) if least >= 7200 else ("minutes", 60) if least >= 120 else ("seconds", 1)
    )
    print(
        f"Time: {least / size:,.0f} to {most / size:,.0f} {unit} of training, judged by how fast "
        "this device computes."
    )


def _draw(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline, report

    settings = DrawSettings(**_given(arguments, DrawSettings))
    prompts = [(prompt, *arguments.beside) for prompt in arguments.prompt]
    drawn = pipeline.draw(
        pipeline.DrawRequest(
            arguments.checkpoint, prompts, settings, arguments.only, **_where(arguments)
        ),
        bar,
    )
    files = report.save_pictures(drawn, arguments.out)
    bar.clear()
    print(
        json.dumps({"files": [str(f) for f in files]})
        if arguments.json
        else "\n".join(str(f) for f in files)
    )


def _consolidate(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    if arguments.closed_form:
        return _closed_form(arguments, bar)
    if arguments.images is None:
        raise SettingError(
            "DSC needs --images, the pictures the newest concept was learned from; without "
            "pictures there is --closed-form."
        )
    settings = ConsolidateSettings(**_given(arguments, ConsolidateSettings))
    result = pipeline.consolidate(
        pipeline.ConsolidateRequest(
            arguments.checkpoint, arguments.images, settings, **_where(arguments)
        ),
        bar,
    )
    bar.clear()
    if arguments.json:
        print(
            json.dumps(
                {
                    "token": result.record.token,
                    "losses": result.losses,
                    "stack_file": str(result.stack_file),
                }
            )
        )
    else:
        print(
            f"Consolidated {result.record.token} with the concepts before it in "
            f"{len(result.losses)} steps; stored in {result.stack_file}"
        )


def _solve_request(arguments: argparse.Namespace) -> Any:
    from . import pipeline

    return pipeline.SolveRequest(
        arguments.checkpoint, SolveSettings(**_given(arguments, SolveSettings)), **_where(arguments)
    )


def _closed_form(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    found = pipeline.consolidate_in_closed_form(_solve_request(arguments), bar)
    bar.clear()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(
        f"Solved for {len(found.after)} concepts at once; rank {found.rank} holds what they ask "
        "for. Lost of what each did to its prompts:"
    )
    for name, after in found.after.items():
        print(f"  {name:<12} {found.before[name]:7.2%} before, {after:7.2%} now")


def _forget(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    request = _solve_request(arguments)
    record = pipeline.forget(request, arguments.token, bar)
    bar.clear()
    if arguments.json:
        print(json.dumps({"token": record.token}))
        return
    print(
        f"Forgot {record.token} ({record.noun}): its word, its previews and what the LoRA knew of "
        f"it are gone from {request.stack_file}"
    )
    print(
        "Files exported before still know it. undo brings it back; history --keep 0 removes it "
        "from the earlier versions too."
    )


def _merge(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    request = _solve_request(arguments)
    renamed = pipeline.merge(request, arguments.other, bar)
    bar.clear()
    if arguments.json:
        print(json.dumps({"renamed": renamed, "stack_file": str(request.stack_file)}))
        return
    print(f"Merged {arguments.other} into {request.stack_file}")
    for old, new in renamed.items():
        print(f"  its {old} is {new} here, since {old} was taken")


def _import(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    record = pipeline.import_concept(
        pipeline.ImportRequest(
            arguments.checkpoint,
            arguments.lora,
            arguments.token,
            arguments.noun,
            arguments.embedding,
            arguments.trigger,
            arguments.strength,
            SolveSettings(**_given(arguments, SolveSettings)),
            **_where(arguments),
        ),
        bar,
    )
    bar.clear()
    print(
        json.dumps({"token": record.token})
        if arguments.json
        else f"{arguments.lora} is {record.name} on the stack now."
    )


def _scores(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline, report
    from .imagefile import check_output, save_own

    if arguments.plot:
        check_output(arguments.plot)
    settings = ScoreSettings(**_given(arguments, ScoreSettings))
    scored = pipeline.dc_scores(
        pipeline.ScoreRequest(
            arguments.checkpoint, arguments.images, settings, **_where(arguments)
        ),
        bar,
    )
    bar.clear()
    if arguments.plot:
        save_own(report.score_sheet(scored), arguments.plot)
    told = [one.right for one in scored if one.right is not None]
    accuracy = sum(told) / len(told) if told else None
    if arguments.json:
        rows = [
            {
                "file": str(one.file),
                "label": one.label,
                "best": one.scores.best,
                "right": one.right,
                "sure": one.scores.sure,
                "probabilities": dict(zip(one.scores.names, one.scores.probabilities, strict=True)),
                "margin": [one.scores.margin, one.scores.margin_low, one.scores.margin_high],
            }
            for one in scored
        ]
        print(json.dumps({"images": rows, "accuracy": accuracy}))
        return
    for one in scored:
        shares = "  ".join(
            f"{name} {p:.2f}"
            for name, p in zip(one.scores.names, one.scores.probabilities, strict=True)
        )
        print(f"{one.file.name:<24} {shares}  {'' if one.scores.sure else '(not sure)'}".rstrip())
    if accuracy is not None:
        print(f"right: {sum(told)} of {len(told)} ({accuracy:.0%})")


def _info(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    found = pipeline.info(arguments.checkpoint, arguments.stack)
    if arguments.json:
        print(json.dumps(found))
        return
    print(found["stack_file"])
    print(
        f"fingerprint {found['fingerprint'][:12]}, rank {found['rank']}, "
        f"{found['trainable_parameters']:,} trainable parameters"
    )
    for concept in found["concepts"]:
        how = (
            f"{concept['images']} pictures, {concept['steps']} steps, {concept['method']}, "
            f"{concept['learned']}"
        )
        print(f"  {concept['token']:<12} {concept['noun']:<16} {how}")
    if not found["concepts"]:
        print("  no concepts yet")


def _export(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    done = pipeline.export(
        arguments.checkpoint,
        arguments.out,
        embeddings=arguments.embeddings,
        format=arguments.format,
        only=arguments.only,
        remove_superseded=arguments.remove_superseded,
        on_progress=bar,
        **_where(arguments),
    )
    bar.clear()
    if arguments.json:
        print(json.dumps(done.as_json()))
        return
    print("\n".join(str(p) for p in (done.lora, *done.embeddings) if p))
    print(f"In prompts: {', '.join(done.triggers)} (ComfyUI: embedding:{done.embeddings[0].stem})")
    for note in done.notes:
        print(note)


def _evaluate(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline, report
    from .imagefile import check_output, save_own

    if arguments.plot:
        check_output(arguments.plot)
    settings = EvaluateSettings(**_given(arguments, EvaluateSettings))
    request = pipeline.EvaluateRequest(
        arguments.checkpoint, arguments.concepts, arguments.clip, settings, **_where(arguments)
    )
    found = pipeline.evaluate(request, bar)
    bar.clear()
    if arguments.plot:
        save_own(report.retention_sheet(found), arguments.plot)
    if not arguments.json:
        print(report.retention_table(found))
        return
    values = {
        "likeness": found.likeness,
        "floor": found.floor,
        "kept": found.kept,
        "recognised": found.recognised,
    }
    plain = {
        name: json.loads(json.dumps(tensor.tolist()).replace("NaN", "null"))
        for name, tensor in values.items()
    }
    print(json.dumps({"concepts": found.names, **plain}))


def _install_webui(arguments: argparse.Namespace, bar: _Bar) -> None:
    from .webui.install import install

    print(install(arguments.path, copy=arguments.copy))


def _ui(arguments: argparse.Namespace, bar: _Bar) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SettingError(
            "The tab needs gradio, which is not installed: pip install 'comfy-continual-lora[ui]'."
        ) from None
    from .files import STACKS
    from .mini.weights import write_checkpoint
    from .webui.alone import launch

    models: Path = arguments.models
    if not any(not path.name.endswith(STACKS) for path in models.rglob("*.safetensors")):
        write_checkpoint(models / "mini-sd.safetensors")
        print(
            f"There was no checkpoint in {models}, so the mini-SD was put there to try things on."
        )
    launch(models, arguments.port, not arguments.no_browser)


def _undo(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    done = pipeline.undo(arguments.checkpoint, arguments.stack, arguments.version)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(
            f"Took back: {done.change}. The stack now holds "
            f"{', '.join(done.tokens) or 'no concept'}."
        )
        print(
            f"What was taken back is version {done.version}: restore {done.version} brings it back."
        )


def _history(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    if arguments.keep is not None:
        pipeline.keep_versions(arguments.checkpoint, arguments.keep, arguments.stack)
    found = pipeline.history(arguments.checkpoint, arguments.stack)
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(one), "file": str(one.file)} for one in found]))
        return
    for one in found:
        mark = "*" if one.current else " "
        print(
            f"{mark} {one.number:>4}  {one.when[:16]:<16}  {one.size / 1e6:>8.1f} MB  "
            f"{one.change}  [{', '.join(one.tokens)}]"
        )
    earlier = [one.size for one in found if not one.current]
    if found:
        print(
            f"* is in use. {len(earlier)} other versions take {sum(earlier) / 1e6:.1f} MB; "
            "restore NUMBER goes to one."
        )
    else:
        print("Nothing was learned yet.")


def _restore(arguments: argparse.Namespace, bar: _Bar) -> None:
    from . import pipeline

    done = pipeline.restore(arguments.checkpoint, arguments.version, arguments.stack)
    if arguments.json:
        print(json.dumps({"version": done.number, "tokens": done.tokens}))
    else:
        print(
            f"The stack is at version {done.number} ({done.change}) and holds "
            f"{', '.join(done.tokens) or 'no concept'}."
        )


# --- flags, made from the settings
# --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "continual-lora",
        description="Teach a Stable Diffusion checkpoint one thing after another.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Any,
        help: str,
        *,
        checkpoint: bool = True,
        machine: bool = True,
        device: bool = False,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=EPILOG
        )
        sub.set_defaults(run=run)
        if checkpoint:
            sub.add_argument(
                "--checkpoint",
                type=Path,
                required=True,
                help="a .safetensors checkpoint or a diffusers folder",
            )
            sub.add_argument(
                "--stack",
                type=Path,
                help="the concept stack, if not the file beside the checkpoint",
            )
        if device:
            sub.add_argument(
                "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)"
            )
        if machine:
            sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    demo = command(
        "demo",
        _demo,
        "learn two concepts on the mini-SD and write a report with pictures",
        checkpoint=False,
        machine=False,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the report (default: demo)"
    )

    mini = command(
        "mini",
        _mini,
        "write the mini-SD, a small Stable Diffusion for trying things out, as a checkpoint",
        checkpoint=False,
        machine=False,
    )
    mini.add_argument("path", type=Path, help="where to write it, such as mini.safetensors")
    mini.add_argument(
        "--stock",
        action="store_true",
        help="the same net as wide as SD1.5, for programs that accept nothing else",
    )

    learn = command("learn", _learn, "teach the checkpoint one more concept", device=True)
    learn.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder with 3 to 15 pictures; name.txt beside name.jpg is its caption, "
        "name.mask.png its mask",
    )
    learn.add_argument("--token", required=True, help="the new word, such as V1")
    learn.add_argument("--noun", required=True, help="what kind of thing it is, such as teapot")
    learn.add_argument(
        "--replace",
        action="store_true",
        help="learn in place of the newest concept, if that has this word; until then it stays",
    )
    learn.add_argument(
        "--plan",
        action="store_true",
        help="learn nothing: say what memory and files it would take, without loading the "
        "checkpoint",
    )
    _add_settings(learn, LearnSettings)

    consolidate = command(
        "consolidate",
        _consolidate,
        "strengthen earlier concepts once more against the newest one (DSC)",
        device=True,
    )
    consolidate.add_argument(
        "--images", type=Path, help="the pictures the newest concept was learned from"
    )
    consolidate.add_argument(
        "--closed-form",
        action="store_true",
        help="solve for all concepts at once instead, in seconds, without pictures",
    )
    _add_settings(consolidate, ConsolidateSettings)
    _add_settings(consolidate, SolveSettings, group="closed form")

    forget = command(
        "forget",
        _forget,
        "take any one concept out, and what later adapters know of it",
        device=True,
    )
    forget.add_argument("--token", required=True, help="its word")
    _add_settings(forget, SolveSettings)

    merge = command(
        "merge",
        _merge,
        "put the concepts of another stack of the same checkpoint on this one",
        device=True,
    )
    merge.add_argument(
        "other", type=Path, help="the other stack, a .concepts.safetensors file; it stays as it is"
    )
    _add_settings(merge, SolveSettings)

    bring = command(
        "import",
        _import,
        "put a K/V LoRA that another program made on the stack, as one concept",
        device=True,
    )
    bring.add_argument(
        "--lora",
        type=Path,
        required=True,
        help="its .safetensors file, in kohya's, diffusers' or PEFT's names",
    )
    bring.add_argument("--token", required=True, help="its word from now on")
    bring.add_argument(
        "--noun",
        default="",
        help="what kind of thing it is; empty: prompts name it by its word alone",
    )
    bring.add_argument(
        "--embedding", type=Path, help="the embedding its prompts used, if there is one"
    )
    bring.add_argument(
        "--trigger",
        default="",
        help="else the word its prompts used, if it is one token, such as sks",
    )
    bring.add_argument(
        "--strength", type=float, default=1.0, help="strength it is used at (default: 1)"
    )
    _add_settings(bring, SolveSettings)

    scores = command(
        "scores",
        _scores,
        "tell which learned concept each picture shows, and how sure that is",
        device=True,
    )
    scores.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder with pictures, or with folders named after tokens to count what is right",
    )
    scores.add_argument(
        "--plot", type=Path, help="also draw the probabilities to this file, such as scores.png"
    )
    _add_settings(scores, ScoreSettings)

    evaluate = command(
        "evaluate",
        _evaluate,
        "tell how much of each concept is kept since it was learned",
        device=True,
    )
    evaluate.add_argument(
        "--concepts",
        type=Path,
        help="folder with folders named after tokens, with their pictures, if you still have them",
    )
    evaluate.add_argument(
        "--clip",
        type=Path,
        help="folder with a CLIP vision model (as transformers saves it) to compare pictures with",
    )
    evaluate.add_argument(
        "--plot",
        type=Path,
        help="also draw the heat map with pictures to this file, such as retention.png",
    )
    _add_settings(evaluate, EvaluateSettings)

    only: dict[str, Any] = {
        "nargs": "+",
        "metavar": "WORD",
        "default": (),
        "help": (
            "solve for a LoRA of these concepts alone: of a stack of many it draws them nearer "
            "than the one LoRA for all"
        ),
    }
    draw = command(
        "draw", _draw, "draw pictures; learned words stand for their concepts", device=True
    )
    draw.add_argument(
        "--prompt",
        required=True,
        action="append",
        help='what to draw, such as "a photo of a V1 teapot"; may be given several times',
    )
    draw.add_argument(
        "--beside",
        action="append",
        default=[],
        help="what to draw to the right of that in the same, wider picture, such as "
        '"a photo of a V2 dog"; may be given several times. Two learned things in one prompt mix '
        "their looks, side by side they do not",
    )
    draw.add_argument("--only", **only)
    draw.add_argument(
        "--out", type=Path, default=Path("drawn"), help="folder for the pictures (default: drawn)"
    )
    _add_settings(draw, DrawSettings, short={"count": "-n"})

    export = command(
        "export",
        _export,
        "write one LoRA and one embedding a word, for ComfyUI, A1111, Forge and diffusers",
        device=True,
    )
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the LoRA, such as the program's Lora folder",
    )
    export.add_argument("--only", **only)
    export.add_argument(
        "--embeddings", type=Path, help="folder for the embeddings (default: the same)"
    )
    export.add_argument(
        "--remove-superseded",
        action="store_true",
        help="also remove this stack's earlier exports of the same concepts, which are listed "
        "otherwise",
    )
    export.add_argument(
        "--format",
        choices=FORMATS,
        default="kohya",
        help="whose names the LoRA has; kohya's load everywhere",
    )

    ui = command(
        "ui",
        _ui,
        "open the tab by itself, in a browser on this machine",
        checkpoint=False,
        machine=False,
    )
    ui.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        help="folder of checkpoints; the mini-SD is put there if it has none",
    )
    ui.add_argument(
        "--port", type=int, help="port of the page (default: the first free one from 7860 on)"
    )
    ui.add_argument("--no-browser", action="store_true", help="do not open a browser")

    webui = command(
        "install-webui",
        _install_webui,
        "put the tab into AUTOMATIC1111, reForge, Forge or Forge Neo as an extension",
        checkpoint=False,
        machine=False,
    )
    webui.add_argument("path", type=Path, help="the web UI's folder (or its --data-dir)")
    webui.add_argument(
        "--copy",
        action="store_true",
        help="copy the files; else a clone is linked, so that updating it updates the tab",
    )

    command("info", _info, "show what a checkpoint has learned")
    undo = command("undo", _undo, "take the last change of the stack back, whatever it was")
    undo.add_argument(
        "--version", type=int, help="do it only if this is the version in use (see history)"
    )
    history = command(
        "history", _history, "list the stack's versions, what made them and what they take"
    )
    history.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="keep N earlier versions of this stack from now on (a new stack: 5)",
    )
    restore = command(
        "restore", _restore, "go to another version of the stack; the one in use now is kept"
    )
    restore.add_argument("version", type=int, help="its number in history")
    return parser


def _add_settings(
    parser: argparse.ArgumentParser,
    settings: type,
    short: dict[str, str] | None = None,
    group: str = "",
) -> None:
    """One flag a setting: type, choices, default, help and (where none is given) heading come from
    its declaration.
    """
    groups: dict[str, Any] = {"": parser}
    for f in dataclasses.fields(settings):
        heading = group or f.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind = {"int": int, "float": float}.get(str(f.type).split(" ")[0], str)
        names = [
            *([short[f.name]] if short and f.name in short else []),
            f"--{'lr' if f.name == 'rate' else f.name.replace('_', '-')}",
        ]
        help = f"{f.metadata['help']} (default: {_default(f)})".replace("%", "%%")
        if str(f.type).startswith("bool"):
            groups[heading].add_argument(
                *names, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=help
            )
        else:
            choices = f.metadata["choices"] or None
            groups[heading].add_argument(
                *names,
                dest=f.name,
                type=kind,
                choices=choices,
                help=help,
                metavar=None if choices else f.name.upper(),
            )


def _default(f: dataclasses.Field) -> str:
    """What happens without the flag, in words."""
    if f.default is not None:
        return said(f.default)
    return suiting(f) or "the checkpoint's own"


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"stack": arguments.stack, "device": arguments.device}


def _given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings the user gave; the others keep their defaults."""
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
