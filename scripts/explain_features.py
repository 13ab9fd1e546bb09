"""Explain features by tokens, bigrams and patterns, or by a model, and score the explanations on held-out documents."""

from steering.command_line import main

if __name__ == "__main__":
    main("explain")
