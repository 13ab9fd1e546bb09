"""Draw a circuit as a page that opens without a network."""

from steering.command_line import main

if __name__ == "__main__":
    main("draw-circuit")
