"""Set a node of an attribution graph to multiples of its value: what the graph predicts, and what happens."""

from steering.command_line import main

if __name__ == "__main__":
    main("intervene")
