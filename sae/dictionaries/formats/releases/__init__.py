"""Published dictionaries with special layouts."""
