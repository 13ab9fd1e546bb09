"""Set a node of an attribution graph to multiples of its value and compare the outcome with the graph's prediction."""

from steering.command_line import main

if __name__ == "__main__":
    main("intervene")
