"""Runs every stage of a recipe that is out of date, in order.

Reads: the source files the recipe names. Writes: DATASET (shards, features, manifest) and RUN.
Run:   python -m jobs.run RECIPE [key=value …]
Again: every stage says it is up to date; a run that was killed goes on where it stopped.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["run", *sys.argv[1:]]))
