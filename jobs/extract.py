"""Computes visual features of every sample that has none from this extractor.

Reads: DATASET/shards. Writes: DATASET/features/<extractor>, DATASET/manifest.
Run:   python -m jobs.extract RECIPE [key=value …]
Again: only shards without features are read.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["extract", *sys.argv[1:]]))
