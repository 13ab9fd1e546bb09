"""Look into a dictionary's features: one pass over a cache, then every feature at once, offline.

index/ makes and reads the index · explanations/ explains features · pages/ draws one · browser/ serves them ·
exports/ writes other formats · notes.py keeps labels and lists · terminal.py is the terminal's command
"""
