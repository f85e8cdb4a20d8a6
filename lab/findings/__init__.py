"""Repeat the analyses of the three papers on the toy model, where the true places of objects are known.

`vtr findings attnmix|visiondrop|consensusdrop` makes the results, which are in the method's page: docs/attnmix.md,
docs/visiondrop.md, docs/consensusdrop.md.
"""
