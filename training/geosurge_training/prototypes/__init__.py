"""An index of one's own pictures, without training."""
