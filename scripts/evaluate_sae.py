"""Measure a dictionary on held-out tokens."""

from sae.command_line import evaluate_sae

if __name__ == "__main__":
    evaluate_sae()
