"""ConsensusDrop (arXiv 2602.00946): one ranking from encoder saliency and query-aware attention, then merging.

A documented reconstruction: no code was released and the paper's body was not available. Every choice that the
abstract leaves open is a field of `consensusdrop.method.ConsensusDrop`; `docs/consensusdrop.md` says what is fact, what
is reconstruction, and how each alternative does on the embedded model.
"""
