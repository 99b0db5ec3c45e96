"""Vision: frozen image networks, and the features that they make of a dataset."""
