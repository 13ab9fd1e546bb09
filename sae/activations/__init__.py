"""Activations on disk: harvest them from text, read them back in shuffled batches, lead each one back to its token.

text.py reads texts · tokens.py cuts them into sequences · plan.py says which sequence is visited when · harvest.py runs the model ·
ledger.py remembers what is on disk · cache.py opens it · batches.py deals it out for training · mapped.py looks into safetensors files.
"""
