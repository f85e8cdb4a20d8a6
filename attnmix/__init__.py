"""AttnMix, the method of AdaFV (arXiv 2501.09532) and AdaV (Findings of ACL 2025).

The budget is split between tokens ranked by text similarity and tokens ranked by CLS attention, anew for each question.
`mixture.py` holds the computation as the paper describes it, `release.py` what the released code does differently and
`method.py` the method. `docs/attnmix.md` lists the differences.
"""
