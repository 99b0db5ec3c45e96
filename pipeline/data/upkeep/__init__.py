"""Upkeep of a dataset: whether it is whole, and files no larger than what they hold."""
