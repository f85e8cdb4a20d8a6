"""VisionDrop (arXiv 2506.22283): reduce step by step, in the encoder and between decoder layers, by visual attention.

No stage reads text. `method.py` says how many tokens each stage leaves, what attention visual tokens receive from each
other, and what the stages do with both. docs/visiondrop.md separates the paper, the released code and what is added
here.
"""
