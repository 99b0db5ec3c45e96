"""Extractors: frozen networks with their preprocessing and selection rule, one file each."""
