"""What else steering with a feature moves, and a direction that moves it alone."""

from steering.command_line import main

if __name__ == "__main__":
    main("effects")
