"""Sightline: from image–text files to a trained, evaluated vision-augmented language model."""

__version__ = "0.1.0"
