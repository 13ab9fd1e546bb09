"""Print a model's continuation without and with a feature added."""

from steering.command_line import main

if __name__ == "__main__":
    main("steer")
