"""Measure a dictionary on held-out tokens."""

from steering.command_line import main

if __name__ == "__main__":
    main("evaluate")
