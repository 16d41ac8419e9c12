"""`python -m tools.operators`."""

import sys

from tools.operators.matrix import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
