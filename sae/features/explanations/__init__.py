"""What a feature stands for: look-ups of tokens, bigrams and patterns, or a judge model, with held-out scores."""
