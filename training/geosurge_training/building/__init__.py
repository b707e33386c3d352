"""From embeddings to a calibrated index bundle."""
