"""ModHiFi pruning under a certificate."""
