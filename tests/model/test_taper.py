"""Tapered norms: a LayerNorm at first, an affine map in the end, and a scale that is a least-squares fit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.taper import TaperNorm, set_gate, taper_norms
from model.transformer import Transformer

WIDTH = 24


def random_norm(gate: float) -> tuple[TaperNorm, Tensor]:
    """Return a norm of random gain, bias and scale, and an input [5, 3, D] of random sizes, in float64."""
    generator = torch.Generator().manual_seed(2)
    norm = TaperNorm(WIDTH).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.scale):
            tensor.copy_(1 + torch.rand(tensor.shape, generator=generator))
    set_gate([norm], gate)
    x = torch.randn(5, 3, WIDTH, generator=generator, dtype=torch.float64)
    return norm, (0.1 + 0.3 * torch.arange(5.0).view(5, 1, 1)) * x + 0.7


def test_with_gate_1_it_is_a_layer_norm() -> None:
    norm, x = random_norm(1.0)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (WIDTH,), norm.weight, norm.bias), rtol=1e-13, atol=1e-13)
    narrow = norm.bfloat16()(x.bfloat16())
    expected = F.layer_norm(x.bfloat16(), (WIDTH,), norm.weight, norm.bias)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, expected, rtol=2**-7, atol=2**-7)


def test_with_gate_0_it_is_one_affine_map_of_all_tokens() -> None:
    norm, x = random_norm(0.0)
    offset = norm(torch.zeros(WIDTH, dtype=torch.float64))
    matrix = torch.stack([norm(row) - offset for row in torch.eye(WIDTH, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(norm(x), x @ matrix.T + offset, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(offset, norm.bias.data)


def test_between_it_is_the_sum_of_its_parts() -> None:
    norm, x = random_norm(0.25)
    parts = []
    for gate in (1.0, 0.0):
        set_gate([norm], gate)
        parts.append(norm(x))
    set_gate([norm], 0.25)
    torch.testing.assert_close(norm(x), 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-13, atol=0)


def test_moments_give_the_least_squares_fit() -> None:
    norm, x = random_norm(1.0)
    centered = (x - x.mean(-1, keepdim=True)).reshape(-1, 1)
    normed = F.layer_norm(x, (WIDTH,)).reshape(-1, 1)
    fitted = torch.linalg.lstsq(centered, normed).solution
    inverses, whole = norm.moments(x)
    torch.testing.assert_close((inverses / whole).view(1, 1), fitted, rtol=1e-12, atol=0)


def test_compiled_blocks_share_code_and_read_the_current_gate() -> None:
    from torch._dynamo.testing import CompileCounter

    config = ModelConfig(
        architecture="SM+TN", temperature="per_head", num_layers=3, hidden_size=32, num_attention_heads=4, seq_length=8
    ).resolved()
    model = Transformer(config, 40)
    norms = taper_norms(model)
    for place, norm in enumerate(norms):
        assert norm.gate == 1 and norm.scale == 0
        norm.scale.fill_(1.0 + place)
    counter, x_TBD = CompileCounter(), torch.randn(8, 2, 32)
    torch._dynamo.reset()
    compiled = [torch.compile(block.forward, backend=counter, fullgraph=True) for block in model.layers.values()]
    outputs = []
    for gate in (1.0, 0.5, 0.0):
        set_gate(norms, gate)
        for function, block in zip(compiled, model.layers.values(), strict=True):
            outputs.append(function(x_TBD)[0])
            torch.testing.assert_close(outputs[-1], block(x_TBD)[0])
    assert counter.frame_count == 1
    assert not torch.allclose(outputs[0], outputs[3]) and not torch.allclose(outputs[3], outputs[6])


def test_a_network_with_open_gates_is_the_one_with_layer_norms() -> None:
    sizes = {"num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 4, "seq_length": 8}
    tokens_TB = torch.randint(40, (8, 2), generator=torch.Generator().manual_seed(0))
    outputs = []
    for architecture in ("SM+TN", "SM+LN"):
        config = ModelConfig(architecture=architecture, **sizes).resolved()  # type: ignore[arg-type]
        model = Transformer(config, 40)
        outputs.append(model(tokens_TB)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
