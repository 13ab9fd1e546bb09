"""Train dictionaries on activations that are computed as they are needed, without a cache."""

from steering.command_line import main

if __name__ == "__main__":
    main("train-live")
