"""Ablations: one recipe varied in one respect at a time, trained with several seeds, and compared."""
