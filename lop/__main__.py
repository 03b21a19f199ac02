"""`python -m lop` is `lop`."""

import sys

from lop.cli import main

if __name__ == "__main__":
    sys.exit(main())
