"""Join feature indexes of one dictionary that were built on different text."""

from steering.command_line import main

if __name__ == "__main__":
    main("merge")
