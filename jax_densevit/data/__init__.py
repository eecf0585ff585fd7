"""Data: order, sources, images, augmentation, pipeline. TensorFlow is imported in this room only, when it feeds."""
