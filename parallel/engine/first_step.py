"""A guard inside every run: after its first step, looks at the gradient of every parameter.

A gradient that is lost somewhere between the loss and the optimizer (in the compiler, in a hook, in a reduction) leaves
the loss of the first step right and the run looking healthy. The optimizer knows: it is handed exact zeros. So the
first step that a process takes records the norm of every parameter's gradient where the optimizer reads it, in the
float32 that all of ZeRO's stages have it in, reduced over replicas. A norm of exactly zero is a fault, unless the model
says that this parameter may have none (`Attention.may_lack_gradient`).

Each tensor-parallel rank's shard is judged by itself; only of the vocabulary's, where a shard may hold padding alone,
the sum over ranks is.
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
"""Mean entropy of a layer's heads under which every token attends to one position."""
VOCABULARY = ("embedding.word.weight", "head.weight")


class GradientError(RuntimeError):
    """A parameter's gradient is lost, not finite, or not what the uncompiled block gives; names parameters."""


class FirstStepCheck:
    """Looks at one step of an engine. All ranks make one, and call it alike.

    Args:
        is_new: whether the run begins with this step. Then a gradient that is not finite is a fault as well; in a
            resumed run such a step is skipped as it would have been, and the next one is looked at.
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
        """Judges the step that has just run, or waits for the next one if it was refused.

        Args:
            entropy_LN: mean entropy in nats of the heads whose attention this rank computed.

        Returns:
            The largest error of a compiled block, None where none was compared.

        Raises:
            GradientError: on every rank, with what any rank found.
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
        """Index, address and number of elements of each piece of a float32 master copy held here."""
        places = []
        for index, (_, parameter) in enumerate(parameters):
            piece = piece_of(parameter, self.engine.optimizer, self.engine.groups)
            if piece is not None:
                places.append((index, piece.master.data_ptr(), piece.master.numel()))
        return places

    def _record(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Adds up the squares of what the optimizer is about to read; DeepSpeed may step one group after the other."""
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
        if not self._is_recorded:  # ZeRO leaves the optimizer out
            return ["at least one parameter"]
        finite = self._squares.isfinite().tolist()
        return [name for name, is_finite in zip(self._names, finite, strict=True) if not is_finite]

    def _raise_on_all_ranks(self, faults: dict[str, list[str]], is_uncompiled: bool) -> None:
        """Raises on every rank if any has a fault, all with the same error message."""
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
