"""`textual_inversion`: only the new word's vectors are learned; the net never changes, so nothing
is forgotten and little is learned.

source      Gal et al. 2022 (arXiv 2208.01618)
equation    || eps - eps_theta(z_t, t, "a photo of a V_n <noun>") ||^2 over V_n alone
remembers   nothing; earlier words cannot change
cost        one U-Net forward and backward pass per step, d numbers stored per vector
deviations  none known
"""

from __future__ import annotations

from ..settings import LearnSettings
from .method import Method


class TextualInversion(Method):
    id = "textual_inversion"

    def adapter_kind(self, settings: LearnSettings) -> str:
        return ""

    def takes(self, kind: str) -> bool:
        return kind == "lora"  # the setting's default, which it does not use
