"""`python -m comfy_continual_lora` is the command `continual-lora`."""

import sys


def main() -> int:
    """Exit status: that of `cli.main`, also for a Ctrl-C while it is imported or as it ends."""
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("continual-lora: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
