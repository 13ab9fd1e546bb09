"""Copy activations of SAELens, or plain arrays, into an activation cache."""

from steering.command_line import main

if __name__ == "__main__":
    main("import")
