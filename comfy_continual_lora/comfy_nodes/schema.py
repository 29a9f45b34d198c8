"""How nodes are declared: schemas, widgets made from settings, messages with the names of widgets.

Defaults, ranges and help come from settings.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import ContinualLoraError, SettingError
from ..fields import check_field, from_widget, help_of
from ..files import stack_path
from ..operations import NAMES
from ..settings import SolveSettings

CATEGORY = "Continual LoRA"
Stack = io.Custom("CONCEPT_STACK")
ADVANCED = {"advanced": True}  # collapsed if the host supports that
_WIDGETS = {  # of a request's fields, if they have other names or are at another node
    "checkpoint": "checkpoint of Load Concept Stack",
    "stack": "stack_name of Load Concept Stack",
    "prediction": "prediction of Load Concept Stack",
    "only": "tokens of Select Concepts",
    "replace": "if_word_exists",
    "clip": "clip_folder",
    "version": "restore of Stack History",
    "keep": "keep of Stack History",
    "remove_superseded": "remove_superseded of Export Concepts",
}
TITLES = {  # of the nodes of operations
    "learn": "Learn Concept",
    "consolidate": "Consolidate (DSC)",
    "closed_form": "Consolidate (closed form)",
    "forget": "Forget Concept",
    "merge": "Merge Concept Stacks",
    "import": "Import LoRA as Concept",
    "scores": "Compute DC Scores",
    "evaluate": "Evaluate Retention",
    "draw": "Apply Concepts",
    "export": "Export Concepts",
    "undo": "Undo Concept",
    "history": "Stack History",
    "restore": "Stack History",
    "info": "Load Concept Stack",
}
WIDGETS = {name: TITLES.get(name) or _WIDGETS.get(name, name) for name in NAMES}


def schema(name: str, title: str, description: str, aliases: Sequence[str], **rest: Any) -> Any:
    """io.Schema of this host's version, without the fields that an older one lacks."""
    supported = {f.name for f in dataclasses.fields(io.Schema)}
    values = {
        "node_id": f"ContinualLora_{name}",
        "display_name": title,
        "category": CATEGORY,
        "description": description,
        "search_aliases": ["continual lora", *aliases],
        **rest,
    }
    return io.Schema(**{key: value for key, value in values.items() if key in supported})


def stack_and_report() -> list[Any]:
    """The outputs of a node that changes a stack."""
    return [
        Stack.Output(display_name="stack", tooltip="The stack as it is now."),
        io.String.Output(display_name="report", tooltip="What was done, and what the stack holds."),
    ]


def first_values(given: dict[str, list]) -> dict[str, Any]:
    """The single values of a node whose inputs are lists.

    Errors: SettingError for a list of none or of different values, which another node may give.
    """
    for name, values in given.items():
        if not values:
            raise SettingError(f"{name} is an empty list. Give it one value, or disconnect it.")
        if any(one is not values[0] and one != values[0] for one in values[1:]):
            raise SettingError(
                f"{name} is a list of {len(values)} values that differ, and this node takes one. Give "
                "it one value."
            )
    return {name: values[0] for name, values in given.items()}


def widgets(settings: type, names: Sequence[str], shown: Sequence[str] = ()) -> list[Any]:
    """The settings' widgets, in this order; all but those `shown` are advanced.

    Saved workflows identify widgets by their position: new ones come last on their node.
    """
    return [_widget(settings, name, name not in shown) for name in names]


def _widget(settings: type, name: str, advanced: bool) -> Any:
    """A setting's widget; "auto" stands for a default of None."""
    f = next(f for f in dataclasses.fields(settings) if f.name == name)
    meta, kind = f.metadata, str(f.type).split(" ")[0]
    help = help_of(f, "Auto")
    help = help[0].upper() + help[1:]
    rest: dict[str, Any] = {
        "optional": True,
        "tooltip": help + ".",
        "extra_dict": ADVANCED if advanced else None,
    }
    if meta["choices"]:
        options = [*(() if f.default is not None else ("auto",)), *meta["choices"]]
        return io.Combo.Input(name, options=options, default=f.default or "auto", **rest)
    if kind == "bool" and f.default is None:
        return io.Combo.Input(name, options=["auto", "yes", "no"], default="auto", **rest)
    if kind == "bool":
        return io.Boolean.Input(name, default=f.default, **rest)
    if kind == "str":
        return io.String.Input(name, default=f.default, **rest)
    if _may_be_auto(f):  # text, so that it can say so; numbers can still be connected
        return io.MultiType.Input(
            io.String.Input(name, default="auto", **rest),
            [io.Int] if kind == "int" else [io.Float, io.Int],
        )
    high = min(meta["high"] or 1_000_000, 2**63 - 1)
    if kind == "int":
        if name == "seed":
            # else ComfyUI would change it at every queue, making each a new request
            rest["control_after_generate"] = False
        return io.Int.Input(
            name,
            default=f.default,
            min=int(meta["low"]),
            max=int(high),
            step=meta["multiple"],
            **rest,
        )
    default: Any = f.default
    step = 1e-6 if 0 < default < 0.01 else 1e-3  # it decides how many digits are shown
    return io.Float.Input(
        name, default=default, min=meta["low"], max=high, step=step, round=1e-7, **rest
    )


def _may_be_auto(f: dataclasses.Field) -> bool:
    """Is it a number's widget that may say auto?"""
    return f.default is None and not f.metadata["choices"] and f.type != "bool | None"


def settings_from(settings: type, given: dict[str, Any]) -> Any:
    """Widgets' values -> settings; auto and 0 become None if that is the default.

    Errors: SettingError for text that is no number.
    """
    return settings(
        **{
            f.name: from_widget(f, given.get(f.name, f.default))
            for f in dataclasses.fields(settings)
        }
    )


_SOLVING = ("energy", "rank", "ridge", "ordinary_weight", "language")


def solving_widgets() -> list[Any]:
    """The widgets of the closed form."""
    return widgets(SolveSettings, _SOLVING)


# --- errors --------------------------------------------------------------------------------------


def validates(
    settings: type = SolveSettings,
    names: Iterable[str] = _SOLVING,
    others: Sequence[str] = (),
    *,
    needs_noun: bool = False,
) -> Any:
    """A node's `validate_inputs` for widgets of settings, and for `others`: token, noun, stack_name.

    ComfyUI marks all the inputs in its signature if one is wrong, and no longer compares these
    with their ranges. So it has only those for which ComfyUI has no range, or a range says too
    little: numbers that may be auto, and multiples.
    """
    unbounded = [
        f.name
        for f in dataclasses.fields(settings)
        if f.name in names and (_may_be_auto(f) or f.metadata["multiple"] > 1)
    ]

    def validate_inputs(cls: type, **given: Any) -> bool | str:
        return _valid(settings, given, needs_noun)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    validate_inputs.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("cls", kind)]
        + [inspect.Parameter(name, kind, default=None) for name in (*others, *unbounded)]
    )
    return classmethod(validate_inputs)


def _valid(settings: type, given: dict[str, Any], needs_noun: bool) -> bool | str:
    """True, or what is wrong, which ComfyUI shows at the node before anything runs."""
    from ..concepts import check_noun, check_spelling

    values = {
        name: one[0] if isinstance(one, (list, tuple)) else one for name, one in given.items()
    }
    values = {name: value for name, value in values.items() if value is not None}  # None: a wire
    try:
        if "token" in values:
            check_spelling(values["token"].strip())
        if "noun" in values:
            check_noun(values["noun"], values.get("token", "").strip(), required=needs_noun)
        if "stack_name" in values:
            stack_path("checkpoint", values["stack_name"].strip())
        for field in dataclasses.fields(settings):
            if field.name in values:
                check_field(field, from_widget(field, values[field.name]))
    except ContinualLoraError as error:
        return error.spelled(WIDGETS)
    return True


Execute = TypeVar("Execute", bound=Callable[..., Any])


def in_widget_names(execute: Execute) -> Execute:
    """Decorator for `execute`: its errors name widgets."""

    @functools.wraps(execute)
    def wrapped(*args: Any, **given: Any) -> Any:
        try:
            return execute(*args, **given)
        except ContinualLoraError as error:
            error.args = (error.spelled(WIDGETS),)
            raise

    return wrapped  # type: ignore[return-value]
