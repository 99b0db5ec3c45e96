"""The verbs of a recipe: each stage reads what the one before it left on disk."""
