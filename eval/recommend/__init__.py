"""`vtr recommend`: the cheapest method and budget that keeps a tolerated loss on the user's own questions.

`halving.py` decides from losses by picture and knows no model. `command.py` asks the questions, `page.py` writes the
report. docs/statistics.md defines the procedure and says how often it errs.
"""
