"""Print a model's continuation without and with a feature added."""

from steering.command_line import steer

if __name__ == "__main__":
    steer()
