"""From images to features: the frozen backbone, its weights, extraction, storage and cache."""
