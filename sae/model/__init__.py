"""A language model with named places: sites.py names them, hooks.py reaches them, language_model.py is the model, `opening/` gets it.

`structure/` finds out how it is put together.
"""
