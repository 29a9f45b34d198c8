"""The tab's names for methods, fields of requests and settings. Light."""

from __future__ import annotations

from ..errors import ContinualLoraError

METHOD_LABELS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
_FIELDS = {
    "checkpoint": "Checkpoint",
    "images": "Pictures of the thing",
    "token": "Word",
    "only": "Word",
    "noun": "Class noun",
    "stack": "Stack",
    "version": "Version",
    "replace": "Replace the newest concept of this word",
    "remove_superseded": "Remove earlier exports",
}


def label_of(name: str) -> str:
    """The tab's name for a field or a setting."""
    return _FIELDS.get(name) or name.replace("_", " ")


def in_labels(error: BaseException) -> str:
    """An error's message with the tab's names for fields and settings."""
    return error.spelled(label_of) if isinstance(error, ContinualLoraError) else str(error)
