"""Text to tokens: documents.py reads documents, tokens.py cuts them into sequences."""
