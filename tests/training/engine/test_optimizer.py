from typing import Any

import pytest
from torch import nn

from pipeline.errors import ConfigError
from pipeline.training.config import OptimizerConfig
from pipeline.training.engine.optimizer import build_optimizer, freeze, parameter_groups


def tiny_module() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 7), nn.LayerNorm(7))


def test_norms_and_biases_do_not_decay() -> None:
    decaying, still = parameter_groups(tiny_module(), OptimizerConfig(weight_decay=0.1))
    assert [tuple(p.shape) for p in decaying["params"]] == [(11, 5), (7, 5)]
    assert [tuple(p.shape) for p in still["params"]] == [(7,), (7,), (7,)]
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)


def test_a_frozen_parameter_is_in_no_group() -> None:
    module = tiny_module()
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(module, OptimizerConfig())
    assert sum(p.numel() for group in groups for p in group["params"]) == 7 * 5 + 7 + 7 + 7


def test_the_optimizer_takes_its_settings_from_the_config() -> None:
    config = OptimizerConfig(learning_rate=0.3, betas=(0.8, 0.9))
    defaults = build_optimizer(tiny_module(), config).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.3, (0.8, 0.9), 1e-8)


def test_a_rate_is_multiplied_where_a_name_matches_and_the_last_match_counts() -> None:
    factors = {"0.*": 0.5, "*": 0.1, "2.bias": 3.0}
    groups = parameter_groups(tiny_module(), OptimizerConfig(learning_rate_factors=factors))
    found = [(group["factor"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert found == [(0.1, [(11, 5), (7, 5)]), (0.1, [(7,), (7,)]), (3.0, [(7,)])]


@pytest.mark.parametrize(
    "use",
    [
        lambda module: freeze(module, ["1.*", "head.*"]),
        lambda module: parameter_groups(
            module, OptimizerConfig(learning_rate_factors={"head.*": 2.0})
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist(use: Any) -> None:
    with pytest.raises(ConfigError, match=r"'head.\*' matches no parameter; there are 0.weight, "):
        use(tiny_module())


def test_what_is_frozen_by_name_is_in_no_group() -> None:
    module = tiny_module()
    freeze(module, ["0.*", "*.bias"])
    groups = parameter_groups(module, OptimizerConfig())
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(7, 5)], [(7,)]]


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave no parameter to train"):
        freeze(tiny_module(), ["*"])
