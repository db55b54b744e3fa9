"""Image classification with any norm: data sets, the paper's networks, training, scores."""
