"""AttnMix, the method of AdaFV (arXiv 2501.09532) and AdaV (Findings of ACL 2025).

For each question anew, the budget is split between tokens ranked by text similarity and tokens ranked by CLS attention.
`method.py` holds the computation as the paper describes it, what the released code does differently, and the method.
`docs/attnmix.md` lists the differences.
"""
