"""Model families: torch modules from tokens and regions to logits, without Ray or files."""
