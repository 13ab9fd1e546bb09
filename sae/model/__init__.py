"""A language model with named sites: sites.py names them, hooks.py reaches them, language_model.py is the model, `opening/` loads it.

`structure/` finds out how it is put together.
"""
