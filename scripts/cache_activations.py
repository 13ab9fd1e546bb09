"""Record a language model's activations on text and store them, shuffled, in a cache."""

from sae.command_line import cache_activations

if __name__ == "__main__":
    cache_activations()
