from torch import nn

from pipeline.training.optimizer import build_optimizer, parameter_groups
from pipeline.training.spec import TrainingConfig


def tiny_module() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 7), nn.LayerNorm(7))


def test_norms_and_biases_do_not_decay() -> None:
    decaying, still = parameter_groups(tiny_module(), weight_decay=0.1)
    assert [tuple(p.shape) for p in decaying["params"]] == [(11, 5), (7, 5)]
    assert [tuple(p.shape) for p in still["params"]] == [(7,), (7,), (7,)]
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)


def test_a_frozen_parameter_is_in_no_group() -> None:
    module = tiny_module()
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(module, weight_decay=0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == 7 * 5 + 7 + 7 + 7


def test_the_optimizer_takes_its_settings_from_the_config() -> None:
    config = TrainingConfig(
        steps=1, global_batch_size=1, micro_batch_size=1, learning_rate=0.3, betas=(0.8, 0.9)
    )
    defaults = build_optimizer(tiny_module(), config).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.3, (0.8, 0.9), 1e-8)
