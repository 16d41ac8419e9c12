"""`python -m laurel_rewrite`."""

from laurel_rewrite.cli import main

main()
