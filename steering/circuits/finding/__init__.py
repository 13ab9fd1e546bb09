"""Which edges of a model do a task, and how well they do it."""
