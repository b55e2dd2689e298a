"""`python -m steadytune.cli`."""

from . import main

if __name__ == "__main__":  # tools that read the package, such as that of the API pages, import this file
    main()
