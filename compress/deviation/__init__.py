"""By how much a changed network can differ from its parent: bounds and measurements."""
