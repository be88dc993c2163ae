"""Compile a stage's blocks, and compare each with itself uncompiled in the first training pass.

A compiler can lose a gradient without an error, while the loss of the first step is still right. So the first time that
a block trains, it runs forward and backward twice more on the same input, compiled and uncompiled, with the same random
gradient of its output. The gradients of its input and of each parameter must agree.

That costs about one micro-batch, once, and the memory of one block. It works under every layout, without communication
of its own, and happens before a CUDA graph is captured.
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
"""Largest relative error of a gradient. Rounding stays far below; a lost or doubled gradient is off by 1."""
RECOMPILE_LIMIT = 256
GRADIENT_FLOOR = 1e-2
"""Share of the norm of all of a block's gradients; the error of a smaller gradient is taken relative to this."""


NOT_COMPILED = (
    "training.compile asks for compiled blocks, and torch.compile compiled nothing; unset TORCHDYNAMO_DISABLE and "
    "TORCH_COMPILE_DISABLE in the environment, or set training.compile=off"
)


class BlockCompileError(RuntimeError):
    """A block cannot be compiled as one graph; the message is one line."""


@dataclass(frozen=True)
class BlockError:
    """The error of one gradient of a compiled block, relative to the uncompiled block's.

    Attributes:
        name: of the parameter, or of the block's input.
        relative: infinite if the compiled block gives no gradient.
        allowed: the largest relative error that rounding may cause.
    """

    name: str
    relative: float
    allowed: float


class CompiledBlock:
    """A block's compiled `forward`, which replaces its own.

    Args:
        layer: the block's number, for error messages.
        verify: whether to compare the first training pass with the uncompiled block.
    """

    def __init__(self, layer: str, block: Block, verify: bool) -> None:
        self.layer, self.block, self.eager = layer, block, block.forward
        # A graph break is an error, since gradients may be lost at it.
        self._compiled: BlockFunction = torch.compile(block.forward, fullgraph=True)
        self._is_due = verify
        self._names: list[str] = []
        self._errors: Tensor | None = None
        self.uncompiled_s = 0.0
        """Seconds that the uncompiled passes of the comparison took."""

    def __call__(self, x_TBD: Tensor, *document_start: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_due and self.block.training and torch.is_grad_enabled():
            self._is_due = False
            self._compare(x_TBD, *document_start)
        return self.compiled(x_TBD, *document_start)

    def compiled(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run the compiled block.

        Raises:
            BlockCompileError: it cannot be compiled as one graph.
        """
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
        """Return the comparison's errors, none before it has run; waits for the device."""
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
    """Compile each block by itself, as one graph; blocks are alike, so one compilation serves all.

    Communication is inside the graph, as operators (`parallel.sharding.collectives`). ZeRO-3's hooks stay outside
    (`parallel.engine.engine.gather_by_block`).

    Args:
        verify: whether to compare each block's first training pass with the uncompiled block.
    """
    # Blocks with normalized weights compile one by one, and again for each shape and mode. Dynamo gives up at a limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Silences a warning that products with a computed bias cannot be autotuned; autotuning is off.
    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)
    for layer, block in transformer.layers.items():
        block.forward = CompiledBlock(layer, block, verify)


@contextlib.contextmanager
def uncompiled(transformer: Transformer) -> Iterator[None]:
    """Run a stage's blocks as they are while the context lasts, with the hooks of their modules."""
    compiled = compiled_blocks(transformer)
    for each in compiled:
        each.block.forward = each.eager  # type: ignore[method-assign]
    try:
        yield
    finally:
        for each in compiled:
            each.block.forward = each  # type: ignore[method-assign,assignment]


def compiled_blocks(transformer: Transformer) -> list[CompiledBlock]:
    """Return a stage's compiled blocks, none if it is not compiled."""
    return [block.forward for block in transformer.layers.values() if isinstance(block.forward, CompiledBlock)]


def was_compiled(transformer: Transformer) -> bool:
    """Return whether the compiler ran, and every block goes through it. Call this after the stage's first pass.

    An environment variable can turn the compiler off. Blocks then run as they are, and equal themselves.
    """
    wrapped = len(compiled_blocks(transformer)) == len(transformer.layers)
    return wrapped and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def _gradients(function: BlockFunction, inputs: dict[str, Tensor], *document_start: Tensor) -> dict[str, Any]:
    """Return the gradients of a block's inputs by name for random gradients of its outputs; None if there is none."""
    outputs = [each for each in function(inputs["input"], *document_start) if each.requires_grad]
    if not outputs:
        return dict.fromkeys(inputs)
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    incoming = [torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming, allow_unused=True)
    return dict(zip(inputs, gradients, strict=True))


@contextlib.contextmanager
def _own_parameters(block: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Give a block other parameters over the same memory, so that no gradient hook of the real ones runs."""
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
    """Return |found - expected|, or infinity if a gradient that is not zero was not found."""
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
