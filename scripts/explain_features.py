"""Explain features by tokens, bigrams and patterns, or by a model, and score the explanations on held-out documents."""

from sae.command_line import explain_features

if __name__ == "__main__":
    explain_features()
