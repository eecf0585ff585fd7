"""Data: order, sources, images, augmentation, pipeline. The only room that imports TensorFlow, and only when it feeds."""
