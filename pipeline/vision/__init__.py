"""Frozen image networks and what they make of a dataset: extractors, feature shards."""
