"""Detectors: boxes and outlines that a frozen R-CNN finds, with the features of each."""
