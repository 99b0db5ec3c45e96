"""Data: from source files to samples in shards to batches. Knows no torch models."""
