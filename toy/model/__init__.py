"""The architectures of the toy models, and their forward passes in training."""
