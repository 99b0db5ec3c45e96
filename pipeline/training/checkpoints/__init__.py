"""Checkpoints: what a run writes in order to go on exactly, and which of them it keeps."""
