"""DeepSpeed's private hooks, which the tests of the engine make use of at every ZeRO stage."""

from importlib import metadata

from pipeline.training.engine import deepspeed_0_19


def test_the_hooks_are_those_of_the_deepspeed_that_is_installed() -> None:
    found = metadata.version("deepspeed")
    assert found == deepspeed_0_19.VERSION, (
        f"DeepSpeed {found} is installed, and pipeline/training/engine/deepspeed_0_19.py reaches "
        f"into the private parts of {deepspeed_0_19.VERSION}: read each of its hooks anew against "
        f"{found}, drop those that DeepSpeed has a public way for by now, and name the module for "
        "that version"
    )
