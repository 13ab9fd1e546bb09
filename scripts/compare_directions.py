"""Compare directions fairly: every method towards one concept, at equal KL, with controls and intervals, as a table and a report."""

from steering.command_line import main

if __name__ == "__main__":
    main("compare")
