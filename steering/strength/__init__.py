"""How strongly to steer, and what a strength does to the text."""
