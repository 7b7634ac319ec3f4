"""Training of Lipschitz networks: constraints, optimizer, Lightning modules."""
