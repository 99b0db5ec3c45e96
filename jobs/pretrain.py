"""Trains the recipe's model on its pretraining objectives.

Reads: DATASET, its features. Writes: RUN/tokenizer, RUN/pretrain (checkpoints, metrics, model).
Run:   python -m jobs.pretrain RECIPE [key=value …]
Again: continues from the newest whole checkpoint; a finished stage does nothing.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["pretrain", *sys.argv[1:]]))
