"""The ``alter`` command."""

from alter.cli import main

if __name__ == "__main__":
    main()
