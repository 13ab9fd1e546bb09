"""Measure a dictionary on a short text, and find the frame that fits."""

from steering.command_line import main

if __name__ == "__main__":
    main("check-dictionary")
