"""Compression: the values of a feature that a sidecar stores."""
