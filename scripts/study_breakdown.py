"""Find what breaks a model along many directions, with intervals over directions and texts."""

from steering.command_line import main

if __name__ == "__main__":
    main("study-breakdown")
