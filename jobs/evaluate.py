"""Scores the model on the held-out split with the benchmarks' official metrics.

Reads: DATASET, its features, RUN/model, RUN/blind/model. Writes: RUN/evaluation.
Run:   python -m jobs.evaluate RECIPE [key=value …]
Again: does nothing unless the model, the data or the benchmarks changed.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["evaluate", *sys.argv[1:]]))
