"""Test whether principal directions mean anything: compare them with random and learned ones at equal KL."""

from steering.command_line import main

if __name__ == "__main__":
    main("principal")
