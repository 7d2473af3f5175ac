"""Lets `python -m sktransfer` run the command line."""

import sys

from sktransfer._cli import main

if __name__ == "__main__":
    sys.exit(main())
