"""The engine: DeepSpeed, with the optimizer, schedule and memory that it is given."""
