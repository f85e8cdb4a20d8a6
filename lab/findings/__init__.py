"""Repeat the analyses of the three papers on the toy model, where the true places of objects are known.

`docs/findings.md` has the results; `vtr findings attnmix|visiondrop|consensusdrop` makes them.
"""
