"""Tokens to a cache: settings.py says what is recorded, plan.py what is visited when, pools.py runs the model on a pool of sequences,
parts.py keeps what it has computed, massive.py finds massive rows, command.py runs the stages, in several processes if torchrun starts
them."""
