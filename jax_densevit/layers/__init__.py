"""Layers: attention, transformer blocks, embeddings, convolutions, resizing. Flax Linen and pure functions."""
