"""An attribution graph's page with its model behind it: check any edge by an intervention."""

from steering.command_line import main

if __name__ == "__main__":
    main("browse-graph")
