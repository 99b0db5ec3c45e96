"""Writes a source's images and texts into shards and lists them in the manifest.

Reads: the source files the recipe names. Writes: DATASET/shards, DATASET/manifest.
Run:   python -m jobs.ingest RECIPE [key=value …]
Again: reads the listing and the manifest; only records that changed are read and written.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["ingest", *sys.argv[1:]]))
