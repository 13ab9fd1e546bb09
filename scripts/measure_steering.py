"""Measure what adding a feature does at several strengths: rate of listed words, readability, against a random direction."""

from steering.command_line import main

if __name__ == "__main__":
    main("measure")
