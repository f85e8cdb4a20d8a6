"""Statistics of token reduction beyond a score: tokens needed, hard questions, loyalty, aggregates over benchmarks.

They take question-id keyed mappings or `SufficientStatistics`, so that tables can call them; docs/statistics.md defines
each with its limits. `vtr stats` prints them for finished runs.
"""
