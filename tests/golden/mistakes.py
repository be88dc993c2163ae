"""Change the arithmetic slightly, one mistake at a time; the golden losses must notice each."""

import functools
from typing import Any
from unittest import mock

from torch.nn import LayerNorm

from tests.golden.losses import Losses, first_losses


def weight_decay_of_everything() -> Any:
    """Apply weight decay to biases, temperatures, thresholds, alpha and beta too."""
    from parallel.engine import engine

    real = engine.parameter_groups

    def groups(transformer: Any, weight_decay: float, *others: Any) -> list[dict[str, Any]]:
        return [group | {"weight_decay": weight_decay} for group in real(transformer, weight_decay, *others)]

    return mock.patch.object(engine, "parameter_groups", groups)


def penalty_summed_over_layers() -> Any:
    """Leave out the 1 / L of the regularizer."""
    from parallel.sharding.regularizer import ShardedRegularizer

    real = ShardedRegularizer.__init__

    def init(self: Any, *args: Any, num_layers: int, **named: Any) -> None:
        real(self, *args, num_layers=num_layers, **named)
        self.factor *= num_layers

    return mock.patch.object(ShardedRegularizer, "__init__", init)


def residual_of_one_layer_not_scaled() -> Any:
    """Remove beta from one layer; beta is 1 before training."""
    from train import parts as setup

    real = setup.build_transformer

    def build(*args: Any, **named: Any) -> Any:
        transformer = real(*args, **named)
        transformer.layers["1"].ffn.beta = None
        return transformer

    return mock.patch.object(setup, "build_transformer", build)


def rate_of_the_next_step() -> Any:
    """Use the learning rate one step early."""
    from train.config import schedule

    real = schedule.learning_rate
    return mock.patch.object(schedule, "learning_rate", lambda config, step, steps: real(config, step + 1, steps))


def smaller_epsilon_of_layer_norms() -> Any:
    """Use 1e-6 instead of torch's 1e-5."""
    return mock.patch("torch.nn.LayerNorm", functools.partial(LayerNorm, eps=1e-6))


def losses_with(mistake: str, name: str) -> Losses:
    """Return `first_losses` with a mistake of this module."""
    with globals()[mistake]():
        return first_losses(name)
