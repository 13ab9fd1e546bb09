"""Which edges of a model do a task: scores, a circuit, and how good it is on other pairs."""

from steering.command_line import main

if __name__ == "__main__":
    main("find-circuit")
