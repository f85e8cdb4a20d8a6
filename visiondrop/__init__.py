"""VisionDrop (arXiv 2506.22283): reduce step by step, in the encoder and between decoder layers, by visual attention.

No text is read at any stage. `method` holds the stages and their options, `schedule` how many tokens each stage leaves,
`scoring` the attention that visual tokens receive from each other. docs/visiondrop.md separates the paper, the released
code and what is added here.
"""
