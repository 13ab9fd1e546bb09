"""How strongly to steer, and the effect of a strength on the text."""
