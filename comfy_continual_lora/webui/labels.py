"""The tab's names for methods, operations, fields of requests and settings. Light."""

from __future__ import annotations

from ..errors import ContinualLoraError
from ..operations import NAMES
from ..presets import METHODS

METHOD_LABELS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
_LABELS = {
    "checkpoint": "Checkpoint",
    "images": "Pictures of the thing",
    "token": "Word",
    "only": "Words",
    "prompts": "Prompt",
    "method": "Method",
    "count": "Pictures",
    "noun": "Class noun",
    "stack": "Stack",
    "version": "Version",
    "prediction": "What its net predicts",
    "replace": "Replace the newest concept of this word",
    "remove_superseded": "Remove earlier exports",
    # buttons
    "learn": "Learn",
    "consolidate": "Consolidate (DSC)",
    "closed_form": "Consolidate (closed form)",
    "scores": "Which concept is in the pictures?",
    "evaluate": "How much is kept?",
    "export": "Export",
    "undo": "Undo the last change",
    "forget": "Forget",
    "rename": "Rename",
    "to": "The new word",
    "restore": "Go back to this version",
    "history": "History of the stack",
    # what the tab does not have
    "import": "import, on the command line",
    "merge": "merge, on the command line",
}


def methods() -> list[str]:
    """All methods as the page lists them: the labels, then the names of those without one."""
    return [*METHOD_LABELS, *(name for name in METHODS if name not in METHOD_LABELS.values())]


def method_of(listed: str) -> str:
    """The method's name."""
    return METHOD_LABELS.get(listed, listed)


def label_of(name: str) -> str:
    """The tab's name for an operation, a field or a setting."""
    return _LABELS.get(name) or name.replace("_", " ")


LABELS = {name: label_of(name) for name in NAMES}


def in_labels(error: BaseException) -> str:
    """An error's message with the tab's names."""
    return error.spelled(LABELS) if isinstance(error, ContinualLoraError) else str(error)
