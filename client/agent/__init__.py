"""The resident agent: what a real device runs."""
