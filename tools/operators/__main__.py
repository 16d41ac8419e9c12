"""`python -m tools.operators`."""

from tools.operators.matrix import main

if __name__ == "__main__":
    main()
