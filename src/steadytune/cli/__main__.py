"""`python -m steadytune.cli`."""

from . import main

main()
