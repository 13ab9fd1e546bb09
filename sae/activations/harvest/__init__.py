"""Tokens to a cache: settings.py has the settings, plan.py the order of sequences, pools.py runs the model on a pool of sequences,
parts.py keeps what it has computed, massive.py finds massive rows, command.py runs the stages, in several processes if torchrun starts
them."""
