"""How time and memory grow with visual tokens and with the batch.

`__main__.py` reads the flags, `series.py` measures on the models of `narrow.py`, `fit.py` fits, `plot.py` draws.
"""
