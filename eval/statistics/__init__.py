"""Statistics of token reduction beyond a score: tokens needed, hard questions, loyalty, averages over benchmarks.

`answers.py` and `relative.py` take question-id keyed mappings or `SufficientStatistics`, so that tables can call them;
docs/statistics.md defines each with its limits. `vtr stats` (`command.py`) prints them for finished runs.
"""
