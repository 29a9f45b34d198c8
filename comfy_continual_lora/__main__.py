"""`python -m comfy_continual_lora` is the command `continual-lora`."""

import sys

from .cli import main

sys.exit(main())
