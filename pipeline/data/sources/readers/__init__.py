"""Readers of file formats, whatever stands in the files."""
