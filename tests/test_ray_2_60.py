"""Ray's private hooks, which its own tests of training and of clusters make use of."""

from importlib import metadata

from pipeline import ray_2_60


def test_the_hooks_are_those_of_the_ray_that_is_installed() -> None:
    found = metadata.version("ray")
    assert found == ray_2_60.VERSION, (
        f"Ray {found} is installed, and pipeline/ray_2_60.py reaches into the private parts of "
        f"{ray_2_60.VERSION}: read each of its hooks anew against {found}, drop those that Ray "
        "has a public way for by now, and name the module for that version"
    )


def test_the_error_of_a_rank_is_found_in_what_ray_wraps_it_in() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    error = ValueError("no features")
    assert ray_2_60.cause_of(UserExceptionWithTraceback(error, "a trace")) is error
    assert ray_2_60.cause_of(error) is error
