"""Record a language model's activations on text and store them, shuffled, in a cache."""

from steering.command_line import main

if __name__ == "__main__":
    main("cache")
