"""Look at features in the web browser."""

from steering.command_line import main

if __name__ == "__main__":
    main("browse")
