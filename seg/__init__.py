"""Street-scene segmentation: data, models, losses, training, scoring, prediction."""
