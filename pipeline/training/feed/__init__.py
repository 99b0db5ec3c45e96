"""The feed: micro-batches, collated and on the device before their step begins."""
