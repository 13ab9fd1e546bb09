"""Published dictionaries in layouts of their own."""
