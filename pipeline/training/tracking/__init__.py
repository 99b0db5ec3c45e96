"""Tracking: what a run logs, and the trackers that are told of it."""
