"""Check the gradient of every parameter after a run's first step.

A gradient can be lost between the loss and the optimizer: in the compiler, in a hook, in a reduction. The loss of the
first step is then still right, and the run looks healthy. But the optimizer receives exact zeros. So the first step of
a process records the norm of every parameter's gradient where the optimizer reads it: in float32, reduced over
replicas, whatever the ZeRO stage. A norm of exactly zero is a fault, unless the model allows it for this parameter
(`Attention.may_lack_gradient`).

Each tensor-parallel rank's shard is checked by itself. For the vocabulary's parameters the sum over ranks is checked,
since a shard may hold padding alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.initialize import named_parameters
from parallel.deepspeed_internals import whole_shape
from parallel.engine.compiled import NOT_COMPILED, BlockError, compiled_blocks, was_compiled
from parallel.engine.engine import Engine
from parallel.engine.telemetry import StepReport
from parallel.names import by_layer, listed, zero_by_chance
from parallel.state.training_state import piece_of, source

LEAST_ENTROPY_NATS = 1e-6
"""Mean entropy of a head at or below which every token attends to one position."""
VOCABULARY = ("embedding.word.weight", "head.weight")


class GradientError(RuntimeError):
    """A gradient is lost, not finite, or not the uncompiled block's; the message names the parameters."""


class FirstStepCheck:
    """Checks one step of an engine; every rank makes one and calls the same methods.

    Args:
        engine: before its first step.
        is_new: whether the run begins with this step. Then a gradient that is not finite is a fault as well. A resumed
            run skips such a step as usual, and the next one is checked.
        layout: in words, for the error message.
        compiles: whether the configuration asks for compiled blocks. That none was compiled is a fault as well.
    """

    def __init__(self, engine: Engine, is_new: bool, layout: str, compiles: bool = False) -> None:
        self.engine, self.is_new, self.layout, self.compiles = engine, is_new, layout, compiles
        self.is_due = True
        parameters = list(named_parameters(engine.stage.transformer))
        self._names = [name for name, _ in parameters]
        self._is_single = [whole_shape(parameter).numel() == 1 for _, parameter in parameters]
        self._is_recorded = False
        self._squares = torch.zeros(len(parameters), dtype=torch.float64, device=engine.device)
        self._pieces = self._places(parameters)
        self._hook = engine.optimizer.register_step_pre_hook(self._record)

    def finish(self, report: StepReport, entropy_LN: Tensor) -> BlockError | None:
        """Check the step that has just run; if a resumed run refused it, leave the check to the next step.

        Args:
            report: of the step.
            entropy_LN: mean entropy in nats of the heads whose attention this rank computed.

        Returns:
            The largest error of a compiled block, or None if none was compared.

        Raises:
            GradientError: on every rank, with the faults of all ranks.
        """
        dist.all_reduce(self._squares, group=self.engine.groups.data)
        lost, wild = self._lost(entropy_LN), self._not_finite()
        self._squares.zero_()
        if not report.accepted and not self.is_new:
            return None
        self.is_due = False
        self._hook.remove()
        transformer = self.engine.stage.transformer
        is_uncompiled = self.compiles and not was_compiled(transformer)
        blocks = [error for block in compiled_blocks(transformer) for error in block.errors()]
        wrong = [error.name for error in blocks if not error.relative <= error.allowed]
        self._raise_on_all_ranks({"lost": [] if wild else lost, "not finite": wild, "wrong": wrong}, is_uncompiled)
        return max(blocks, key=lambda error: error.relative, default=None)

    def _places(self, parameters: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[int, int, int]]:
        """Return the parameter's index, address and number of elements of each float32 master piece held here."""
        places = []
        for index, (_, parameter) in enumerate(parameters):
            piece = piece_of(parameter, self.engine.optimizer, self.engine.groups)
            if piece is not None:
                places.append((index, piece.master.data_ptr(), piece.master.numel()))
        return places

    def _record(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Add up the squares of the gradients that the optimizer is about to read, maybe one group of several."""
        self._is_recorded = True
        for flat in (flat for group in adam.param_groups for flat in group["params"] if flat.grad is not None):
            for index, address, size in self._pieces:
                start = (address - flat.data_ptr()) // flat.element_size()
                if 0 <= start < flat.numel():
                    values = flat.grad.flatten()[start : start + size]
                    self._squares[index] += torch.linalg.vector_norm(values, dtype=torch.float64).square()

    def _lost(self, entropy_LN: Tensor) -> list[str]:
        stage, groups = self.engine.stage, self.engine.groups
        over_ranks = self._squares.clone()
        dist.all_reduce(over_ranks, group=groups.tensor)
        may_lack = set()
        for (layer, block), entropy_N in zip(stage.transformer.layers.items(), entropy_LN, strict=True):
            sharp = bool((entropy_N <= LEAST_ENTROPY_NATS).any())
            may_lack |= {f"layers.{layer}.attention.{name}" for name in block.attention.may_lack_gradient(sharp)}
        zero = [
            (name, is_single)
            for name, is_single, own, whole in zip(
                self._names, self._is_single, self._squares.tolist(), over_ranks.tolist(), strict=True
            )
            if (whole if name in VOCABULARY else own) == 0 and name not in may_lack
        ]
        singles = [name for name, is_single in zip(self._names, self._is_single, strict=True) if is_single]
        by_chance = zero_by_chance((name for name, is_single in zero if is_single), singles)
        return [source(name, stage) for name, _ in zero if name not in by_chance]

    def _not_finite(self) -> list[str]:
        if not self._is_recorded:  # ZeRO has skipped the optimizer
            return ["at least one parameter"]
        finite = self._squares.isfinite().tolist()
        return [name for name, is_finite in zip(self._names, finite, strict=True) if not is_finite]

    def _raise_on_all_ranks(self, faults: dict[str, list[str]], is_uncompiled: bool) -> None:
        """Raise on every rank if any has a fault, with the same error message."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (faults, is_uncompiled))
        if any(uncompiled for _, uncompiled in found):
            raise GradientError(f"{NOT_COMPILED}. Nothing was saved")
        named = {kind: sorted({name for rank, _ in found for name in rank[kind]}, key=by_layer) for kind in faults}
        said = {
            "lost": "the gradient is exactly zero of",
            "not finite": "the gradient is not finite of",
            "wrong": "the compiled block's gradient is not the uncompiled block's of",
        }
        parts = [f"{words} {listed(named[kind])}" for kind, words in said.items() if named[kind]]
        if parts:
            raise GradientError(
                f"the first step is not right under {self.layout} with torch {torch.__version__}: {'; '.join(parts)}. "
                "Nothing was saved. Set training.compile=off and start again; python -m parallel.compare shows which "
                "layouts compute what one process does"
            )
