"""Train dictionaries of several kinds, widths, seeds and sites together."""

from steering.command_line import main

if __name__ == "__main__":
    main("train-plan")
