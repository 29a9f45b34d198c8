"""How the threads of one computation wait for each other, in the processes that are the project's own:
the command line and the worker. Light; before torch is imported.

By itself OpenMP has a thread that is done look for the others in a loop for milliseconds. On a
machine whose cores are all busy that loop takes the core that one of the others is waiting for, so
that a step takes many times as long (benchmarks/LOG.md). Here it looks for some microseconds, which
is enough where the others run, and then sleeps.
"""

from __future__ import annotations

import os

LOOKS = {
    "GOMP_SPINCOUNT": "1000",  # rounds of the loop; GNU's OpenMP: torch on Linux
    "KMP_BLOCKTIME": "0",  # milliseconds; Intel's and LLVM's: Windows, macOS, conda
}


def wait_briefly() -> None:
    """Whoever has set one of these variables, or OMP_WAIT_POLICY, has decided; nothing is changed."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *LOOKS}:
        os.environ.update(LOOKS)
