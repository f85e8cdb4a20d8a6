"""ConsensusDrop (arXiv 2602.00946): one ranking from encoder saliency and query-aware attention, then merging.

This is a reconstruction: no code was released and the paper's body was not available. Every choice that the abstract
leaves open is a field of `consensusdrop.method.ConsensusDrop`; `docs/consensusdrop.md` separates fact from
reconstruction and has the scores of each alternative on the toy model.
"""
