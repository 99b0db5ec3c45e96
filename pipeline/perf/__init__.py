"""Side-by-side measurements: what `sightline bench` prints."""
