"""A driver of its own, to be killed: trains the stand-in in a folder with two Ray workers.

Run by test_launch: `python -m tests.training.driver FOLDER`.
"""

import sys

from pipeline.training import launch
from tests.training.stand_in import make_spec, ray_worker


def main() -> None:
    launch._on_ray_worker = ray_worker
    spec = make_spec(sys.argv[1], steps=40)
    result = launch.launch(spec, launch.ClusterConfig(workers=2), print)
    print(result.state)


if __name__ == "__main__":
    main()
