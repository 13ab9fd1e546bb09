"""Train one or several dictionaries on an activation cache."""

from steering.command_line import main

if __name__ == "__main__":
    main("train")
