"""The front door: parses, wires the rooms together, prints."""
