"""Look into a dictionary's features: one pass over a cache, then every feature at once, offline.

index.py makes the index · records.py reads it · search.py and table.py find features · page.py draws one · explain.py says what they do ·
list.py is the terminal's command, browse.py the server's (server.py, screens.py, panels.py, guard.py, notes.py, prompt.py) ·
export.py writes other formats · text.py turns tokens into text.
"""
