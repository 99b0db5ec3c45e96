"""Tars: shards as we write them, and the tars of others, read by position."""
