"""Training: the loop, its steps, and everything that lets a run be cut off and go on."""
