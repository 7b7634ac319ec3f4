"""The big table: every score with every compensation at every budget, and an opponent."""
