"""The tab's names for methods, fields of requests and settings. Light."""

from __future__ import annotations

from ..errors import ContinualLoraError
from ..presets import METHODS

METHOD_LABELS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
_FIELDS = {
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
    "replace": "Replace the newest concept of this word",
    "remove_superseded": "Remove earlier exports",
}


def methods() -> list[str]:
    """All methods as the page lists them: the labels, then the names of those without one."""
    return [*METHOD_LABELS, *(name for name in METHODS if name not in METHOD_LABELS.values())]


def method_of(listed: str) -> str:
    """The method's name."""
    return METHOD_LABELS.get(listed, listed)


def label_of(name: str) -> str:
    """The tab's name for a field or a setting."""
    return _FIELDS.get(name) or name.replace("_", " ")


def in_labels(error: BaseException) -> str:
    """An error's message with the tab's names for fields and settings."""
    return error.spelled(label_of) if isinstance(error, ContinualLoraError) else str(error)
