"""Explanations of features: look-ups of tokens, bigrams and patterns, or a judge model, with held-out scores."""
