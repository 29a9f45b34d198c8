"""Stage 5: the methods, one file each; `METHODS` is the table the contract tests run over."""

from __future__ import annotations

from .c_lora import CLora
from .closed_form import ClosedForm
from .custom_diffusion import CustomDiffusion
from .custom_diffusion_ewc import CustomDiffusionEwc
from .lora import Lora
from .lora_dsc import LoraDsc
from .lora_dsc_ewc import LoraDscEwc
from .lora_dsc_ewc_dc import LoraDscEwcDc
from .lora_ewc import LoraEwc
from .lora_ewc_dc import LoraEwcDc
from .method import Method
from .retention import Retention
from .textual_inversion import TextualInversion

_ALL = (
    TextualInversion,
    CustomDiffusion,
    CustomDiffusionEwc,
    Lora,
    CLora,
    LoraEwc,
    LoraEwcDc,
    LoraDsc,
    LoraDscEwc,
    LoraDscEwcDc,
    Retention,
    ClosedForm,
)
METHODS: dict[str, Method] = {method.id: method() for method in _ALL}
