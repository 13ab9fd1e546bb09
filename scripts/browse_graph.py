"""Serve an attribution graph's page together with its model: check any edge by an intervention."""

from steering.command_line import main

if __name__ == "__main__":
    main("browse-graph")
