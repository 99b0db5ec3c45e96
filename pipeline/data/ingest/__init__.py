"""Ingest: from a source's records to samples in shards that the manifest lists."""
