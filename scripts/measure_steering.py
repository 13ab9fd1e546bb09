"""Measure what adding a feature does at several strengths: rate of listed words, readability, against a random direction."""

from steering.command_line import measure_steering

if __name__ == "__main__":
    measure_steering()
