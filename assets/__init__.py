"""The two toy LLaVA-1.5 and small data sets in the layout of the benchmarks, as a package without code.

In a checkout this folder is `assets/`; `pip install ./assets` installs it as `visual_token_reduction_toy`.
"""
