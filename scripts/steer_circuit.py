"""Steer at a circuit's nodes (heads, queries, keys, values) and compare with the whole stream and random heads at equal KL."""

from steering.command_line import main

if __name__ == "__main__":
    main("steer-circuit")
