"""Who coordinates: rounds, checkpoints, metrics; holds a patch, never private data."""
