"""Compiles a stage's blocks and, in the first training pass, compares each with itself uncompiled.

A compiler can lose a gradient without an error, and the loss of the first step is right all the same. So the first time
that a block runs in training it runs four passes more, on the same input: forward and backward compiled and forward
and backward uncompiled, with the same random gradient coming in. The gradients of its input and of each of its
parameters must agree. That costs about one more micro-batch, once, and the memory of one block; it needs no
communication of its own, holds under every layout, and comes before a CUDA graph is captured.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.initialize import plain_name
from model.transformer import Block, Transformer

BlockFunction = Callable[..., tuple[Tensor, Tensor]]

LARGEST_ERROR = {torch.bfloat16: 0.1, torch.float32: 1e-2, torch.float64: 1e-6}
"""Relative, of a gradient. Rounding differs by far less; a gradient that is lost or counted twice is off by 1."""
RECOMPILE_LIMIT = 256
GRADIENT_FLOOR = 1e-2
"""Of the norm of all of a block's gradients: what is smaller is compared with this."""


NOT_COMPILED = (
    "training.compile asks for compiled blocks, and torch.compile compiled nothing; unset TORCHDYNAMO_DISABLE and "
    "TORCH_COMPILE_DISABLE in the environment, or set training.compile=off"
)


class BlockCompileError(RuntimeError):
    """A block cannot be compiled as one graph; one line."""


@dataclass(frozen=True)
class BlockError:
    """How far the gradients of a compiled block lie from those of the same block uncompiled."""

    name: str  # of the parameter, or of the block's input
    relative: float  # infinite where the compiled block gives none
    allowed: float


class CompiledBlock:
    """Takes the place of a block's `forward`.

    Args:
        layer: the block's number, for error messages.
        verify: whether the first training pass is compared.
    """

    def __init__(self, layer: str, block: Block, verify: bool) -> None:
        self.layer, self.block, self.eager = layer, block, block.forward
        # A graph that breaks is an error: where it breaks, gradients may get lost.
        self._compiled: BlockFunction = torch.compile(block.forward, fullgraph=True)
        self._is_due = verify
        self._names: list[str] = []
        self._errors: Tensor | None = None
        self.uncompiled_s = 0.0
        """Time of the uncompiled passes."""

    def __call__(self, x_TBD: Tensor, *document_start: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_due and self.block.training and torch.is_grad_enabled():
            self._is_due = False
            self._compare(x_TBD, *document_start)
        return self.compiled(x_TBD, *document_start)

    def compiled(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BlockCompileError(
                f"layer {self.layer} cannot be compiled as one graph by torch {torch.__version__} "
                f"({_reason(error)}); set training.compile=off"
            ) from error
        except RuntimeError as error:
            if "found no compiled frames" in str(error):
                raise BlockCompileError(NOT_COMPILED) from error
            raise

    def errors(self) -> list[BlockError]:
        """What the comparison found; waits for the device. Empty before it."""
        if self._errors is None:
            return []
        allowed = LARGEST_ERROR[next(self.block.parameters()).dtype]
        found = zip(self._names, self._errors.tolist(), strict=True)
        return [BlockError(f"layers.{self.layer}.{name}", relative, allowed) for name, relative in found]

    def _compare(self, x_TBD: Tensor, *document_start: Tensor) -> None:
        x_TBD = x_TBD.detach().requires_grad_()
        with _own_parameters(self.block) as parameters:
            inputs = {"input": x_TBD, **parameters}
            found = _gradients(self.compiled, inputs, *document_start)
            begin = _now(x_TBD)
            expected = _gradients(self.eager, inputs, *document_start)
            self.uncompiled_s = _now(x_TBD) - begin
        names = [name for name, gradient in expected.items() if gradient is not None]
        norms = torch.stack([_norm(expected[name]) for name in names])
        floor = GRADIENT_FLOOR * norms.norm()
        errors = [_distance(found[name], expected[name]) for name in names]
        self._names = [plain_name(name) for name in names]
        self._errors = torch.stack(errors) / torch.maximum(norms, floor).clamp_min(1e-30)


def compile_blocks(transformer: Transformer, verify: bool = False) -> None:
    """Compiles each block by itself, as one graph; blocks are alike, so one compilation serves all.

    Communication is in the graph as operators (`parallel.sharding.collectives`), ZeRO-3's hooks are around it
    (`parallel.engine.engine.gather_by_block`).

    Args:
        verify: whether a block's first training pass is compared with itself uncompiled.
    """
    # Blocks with normalized weights compile one by one, shapes and modes too; beyond its limit Dynamo would give up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # it warns that it cannot try out products whose bias is computed, which nobody asked it to
    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)
    for layer, block in transformer.layers.items():
        block.forward = CompiledBlock(layer, block, verify)


def compiled_blocks(transformer: Transformer) -> list[CompiledBlock]:
    """The compiled blocks of a stage, none where it is not compiled."""
    return [block.forward for block in transformer.layers.values() if isinstance(block.forward, CompiledBlock)]


def was_compiled(transformer: Transformer) -> bool:
    """Return whether the compiler ran, and every block goes through it. Call this after the stage's first pass.

    An environment variable can turn the compiler off. Blocks then run as they are, and equal themselves.
    """
    wrapped = len(compiled_blocks(transformer)) == len(transformer.layers)
    return wrapped and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def _gradients(function: BlockFunction, inputs: dict[str, Tensor], *document_start: Tensor) -> dict[str, Any]:
    """Gradients of a block's inputs by name, None where there is none, for random gradients of its outputs."""
    outputs = [each for each in function(inputs["input"], *document_start) if each.requires_grad]
    if not outputs:
        return dict.fromkeys(inputs)
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    incoming = [torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming, allow_unused=True)
    return dict(zip(inputs, gradients, strict=True))


@contextlib.contextmanager
def _own_parameters(block: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Puts parameters of their own, over the same memory, into a block: no gradient hook of the real ones runs."""
    places = [(module, name) for module in block.modules() for name, p in module._parameters.items() if p is not None]
    real = [module._parameters[name] for module, name in places]
    try:
        for (module, name), parameter in zip(places, real, strict=True):
            assert parameter is not None
            module._parameters[name] = nn.Parameter(parameter.data)
        yield dict(block.named_parameters())
    finally:
        for (module, name), parameter in zip(places, real, strict=True):
            module._parameters[name] = parameter


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _distance(found: Tensor | None, expected: Tensor) -> Tensor:
    """|found - expected|, infinite where nothing was found for a gradient that is not zero."""
    if found is None:
        return torch.where(_norm(expected) > 0, torch.inf, 0.0)
    exact = torch.promote_types(expected.dtype, torch.float32)
    return _norm(found.to(exact) - expected.to(exact))


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
