"""Our architectures in PyTorch layers, as its users would write them: what `benchmark --peers` times ours against."""
