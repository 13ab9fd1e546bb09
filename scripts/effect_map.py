"""What else steering with a feature moves, and a direction that moves it alone."""

from steering.command_line import effect_map

if __name__ == "__main__":
    effect_map()
