"""Fixtures of the stages' tests."""

from tests.training.conftest import alone

__all__ = ["alone"]
