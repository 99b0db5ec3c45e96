"""Loading: the samples of each step on each rank, in an order that is arithmetic."""
