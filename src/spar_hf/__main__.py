"""`python -m spar_hf` is `spar`; the commands themselves are in the package `spar_cli`."""

import sys

from spar_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
