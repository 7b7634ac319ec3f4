"""How much has to go, and from which place."""
