"""Steering at a circuit's nodes, against the whole stream and random heads at equal KL."""

from steering.command_line import main

if __name__ == "__main__":
    main("steer-circuit")
