"""`python -m laurel_rewrite`."""

from laurel_rewrite.app.cli import main

main()
