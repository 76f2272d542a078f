"""`python -m moestro`."""

import sys

from moestro.cli import main

if __name__ == "__main__":
    sys.exit(main())
