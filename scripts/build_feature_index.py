"""Index every feature of a dictionary in one pass over a cache."""

from steering.command_line import main

if __name__ == "__main__":
    main("index")
