"""List and search features in the terminal, and write their pages."""

from steering.command_line import main

if __name__ == "__main__":
    main("list")
