"""`textual_inversion`: only the new word's vector is learned; the net never changes, so nothing is
forgotten and little is learned.

source      Gal et al. 2022 (arXiv 2208.01618)
equation    || eps - eps_theta(z_t, t, "a photo of a V_n <noun>") ||^2 over V_n alone
remembers   nothing; earlier words cannot change
cost        one U-Net pass forward and backward a step, d numbers stored a concept
deviations  none known; the published numbers are not reproduced yet
"""

from __future__ import annotations

from .method import Method


class TextualInversion(Method):
    id = "textual_inversion"
    adapter = ""
