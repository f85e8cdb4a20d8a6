"""The analyses behind the three papers, repeated on the toy model, where the objects' true places are known.

`vtr findings attnmix|visiondrop|consensusdrop` makes the results, which are in the method's page: docs/attnmix.md,
docs/visiondrop.md, docs/consensusdrop.md.
"""
