"""Find which edges of a model, or features of dictionaries, do a task: scores, a circuit, its quality on held-out pairs."""

from steering.command_line import main

if __name__ == "__main__":
    main("find-circuit")
