"""Features plus tokens to logits: torch modules that know neither Ray, DeepSpeed nor files."""
