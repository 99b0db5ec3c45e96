"""The training of a model from batches: the loop with its engine, checkpoints and launch."""
