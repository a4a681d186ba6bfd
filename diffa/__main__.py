"""Run the command line with ``python -m diffa``."""

from diffa.cli import main

if __name__ == "__main__":
    main()
