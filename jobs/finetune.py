"""Fine-tunes the pretrained model on the recipe's benchmarks, then its blind twin.

Reads: DATASET, its features, RUN/pretrain/model. Writes: RUN/finetune, RUN/blind, RUN/model.
Run:   python -m jobs.finetune RECIPE [key=value …]
Again: continues from the newest whole checkpoint; a finished stage does nothing.
"""

import sys

from pipeline.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(["finetune", *sys.argv[1:]]))
