"""Statistics of token reduction beyond a score: tokens needed, hard questions, loyalty, averages over benchmarks.

`answers.py` and `relative.py` take mappings by question id or `SufficientStatistics`, so that tables can call them too.
docs/statistics.md defines each statistic and its limits. `vtr stats` (`command.py`) prints them for finished runs.
"""
