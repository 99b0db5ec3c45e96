"""From a batch to a trained model: the loop, its engine, its checkpoints and its launch."""
