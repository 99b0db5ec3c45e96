"""The manifest: which samples a dataset has, where each lies, and why others are not there.

Ingest and extraction commit to it; everything after them begins by asking it.
"""

from pipeline.data.manifest.manifest import Manifest as Manifest
