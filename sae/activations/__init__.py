"""Activations on disk: harvest them from text, read them back in shuffled batches, lead each one back to its token.

In: text.py reads texts · tokens.py cuts them into sequences · settings.py says what is recorded · plan.py what is visited when ·
harvest.py runs the stages · pools.py runs the model · number_formats.py has them on disk · ledger.py remembers what is on disk ·
writers.py lets several processes make one cache · imports.py takes in other tools' files, which sources.py reads.
Out: source.py is what training reads · cached.py reads it from a cache, which cache.py opens · live.py computes it ·
manifest.py checks what is there · describe.py and export.py tell others what is in it · shuffle.py measures how well it is shuffled.
"""
