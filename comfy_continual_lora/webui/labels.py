"""The tab's names for methods, operations, fields of requests and settings. Light."""

from __future__ import annotations

from ..errors import ContinualLoraError
from ..operations import NAMES

METHOD_LABELS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
_LABELS = {
    "checkpoint": "Checkpoint",
    "images": "Pictures of the thing",
    "token": "Word",
    "only": "Word",
    "noun": "Class noun",
    "stack": "Stack",
    "version": "Version",
    "replace": "Replace the newest concept of this word",
    "remove_superseded": "Remove earlier exports",
    # buttons
    "learn": "Learn",
    "consolidate": "Consolidate (DSC)",
    "closed_form": "Consolidate (closed form)",
    "scores": "Compute DC scores",
    "evaluate": "Evaluate retention",
    "export": "Export",
    "undo": "Undo the last change",
    "forget": "Forget the word on the left",
    "restore": "Go back to this version",
    "history": "History of the stack",
    # what the tab does not have
    "prediction": "prediction, on the command line",
    "import": "import, on the command line",
    "merge": "merge, on the command line",
}


def label_of(name: str) -> str:
    """The tab's name for an operation, a field or a setting."""
    return _LABELS.get(name) or name.replace("_", " ")


LABELS = {name: label_of(name) for name in NAMES}


def in_labels(error: BaseException) -> str:
    """An error's message with the tab's names."""
    return error.spelled(LABELS) if isinstance(error, ContinualLoraError) else str(error)
