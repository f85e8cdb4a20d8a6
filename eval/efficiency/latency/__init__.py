"""The efficiency protocol (docs/efficiency.md): methods in turns beside `full` and their oracles, on one model.

Followed from the script to the table: `__main__.py` reads the flags, `scenarios.py` says what is asked, `questions.py`
asks it, `methods.py` builds the methods, `measure.py` times them, `counts.py` counts once what they compute,
`accuracy.py` holds the gate, `run.py` puts the result together, and `ratios.py`, `table.py` and `plot.py` present it.
"""
