"""The launch of ranks: on Ray Train, or in this process."""
