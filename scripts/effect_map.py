"""Measure what else steering with a feature changes, and find a direction that changes this feature alone."""

from steering.command_line import main

if __name__ == "__main__":
    main("effects")
