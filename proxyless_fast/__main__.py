"""`python -m proxyless_fast`, also as `torchrun -m proxyless_fast`: the command line."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
