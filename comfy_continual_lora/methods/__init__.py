"""Stage 5: the methods, one file each; `METHODS` is the table the contract tests run over."""

from __future__ import annotations

from .lora import Lora
from .method import Method
from .textual_inversion import TextualInversion

METHODS: dict[str, Method] = {method.id: method for method in (Lora(), TextualInversion())}
