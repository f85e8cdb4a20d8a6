"""AttnMix, the method of AdaFV (arXiv 2501.09532) and AdaV (Findings of ACL 2025): text and saliency share a budget.

The share of each is chosen per question. `mixture.py` holds the maths as the paper means it, `release.py` what the
released code does differently, `method.py` the method. `docs/attnmix.md` says what is fact and where the two part.
"""
