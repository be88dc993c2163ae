"""Test the activations that a rank keeps for its backward pass: predicted by formulas against counted."""

import pytest
import torch
from torch import Tensor

from parallel.counting.footprint import ELEMENT_BYTES, Workload, block_bytes
from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import VOCAB_SIZE, tiny_config
from train.compare.layouts import apply_layout, reference_layout
from train.config import Config

SEQUENCES = 64  # by which activations are larger than every matrix


@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize(
    ("layout", "form"), [("tp=1", "auto"), ("tp=2", "auto"), ("tp=2:sp=1", "split"), ("tp=2:sp=1", "replicated")]
)
def test_what_a_fused_ffn_keeps_of_a_token(layout: str, form: str, norm: str) -> None:
    parsed = parse_layout(layout)
    config = tiny_config(architecture="SM+ScFuFFN", norm=norm, fused_ffn=form)
    applied = apply_layout(config, parsed, reference_layout(config, [parsed]))
    model, tp = config.model, parsed.tp
    work = Workload(model, applied.parallel, applied.grid(parsed.world_size), VOCAB_SIZE, SEQUENCES, 1)
    matrix = model.hidden_size**2 // (1 if form == "replicated" else tp)
    predicted = block_bytes(work, "selective") / ELEMENT_BYTES - matrix  # all but the matrix that alpha divides
    whole = work.tokens * model.hidden_size
    attention = (1 + (norm == "layernorm")) * whole / (tp if parsed.sp else 1) + 3 * whole / tp
    for kept in run_ranks(_kept_by_ffn, parsed.world_size, applied):
        assert kept == predicted - attention


def _kept_by_ffn(config: Config) -> int:
    """Return the elements of all kept tensors that are as large as activations, each storage once."""
    from train.parts import build_stage

    stage, groups = build_stage(config, VOCAB_SIZE)
    block = stage.transformer.layers["0"]
    positions = config.model.seq_length // (groups.grid.tp if config.parallel.sequence_parallel else 1)
    leaf_TBD = torch.randn(positions, SEQUENCES, config.model.hidden_size, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x_TBD = leaf_TBD.clone()
        out_TBD = block.ffn(block.ffn_norm(x_TBD), x_TBD)
    assert out_TBD.shape == x_TBD.shape
    return sum(size for size in kept.values() if size >= x_TBD.numel() // groups.grid.tp)
