"""Which components go first: scores, exact elimination, subset fidelity."""
