"""`lora`: Custom Diffusion with LoRA, learned in sequence - the baseline that forgets.

source      Kumari et al. 2023 (arXiv 2212.04488) with the K/V LoRA of Smith et al. 2023
            (arXiv 2304.06027); row "CD with LoRA" of Jha et al. 2025
equation    || eps - eps_theta(z_t, t, "a photo of a V_n <noun>") ||^2  over LoRA_n and V_n;
            LoRA_n starts from LoRA_{n-1}
remembers   only the adapter itself
cost        one U-Net forward and backward pass per step
deviations  none known
"""

from __future__ import annotations

from .method import Method


class Lora(Method):
    id = "lora"
