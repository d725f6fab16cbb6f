"""`python -m spar_hf.cli` is `spar`; the commands themselves are in the package `spar_cli`."""

import sys

from spar_cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
