"""The pretend world: fleets, partitions, the in-process grid, recipes and reports."""
