"""The analyses behind the three papers, repeated on the toy model, where the objects' true places are known.

`docs/findings.md` has the results; `vtr findings attnmix|visiondrop|consensusdrop` makes them.
"""
