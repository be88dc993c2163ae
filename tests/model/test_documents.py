"""Attention within documents: a packed sequence against its documents run one by one."""

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer

VOCAB_SIZE = 23
LENGTHS = (5, 1, 7, 3)


def model(**changes: object) -> Transformer:
    sizes: dict = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "init_std": 0.3}
    config = ModelConfig(seq_length=sum(LENGTHS), **{**sizes, **changes}).resolved()
    transformer = Transformer(config, VOCAB_SIZE, seed=3).double()
    return transformer


def packed(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and labels [T, 1] and document starts [1, T] of four documents."""
    generator = torch.Generator().manual_seed(seed)
    tokens_TB, labels_TB = (torch.randint(0, VOCAB_SIZE, (sum(LENGTHS), 1), generator=generator) for _ in range(2))
    starts = [sum(LENGTHS[:i]) for i, length in enumerate(LENGTHS) for _ in range(length)]
    return tokens_TB, labels_TB, torch.tensor([starts], dtype=torch.int32)


def test_a_packed_sequence_is_its_documents_one_by_one() -> None:
    """Rotary positions are relative and the temperature is a head's, so that packing may change nothing at all."""
    transformer = model(positions="rotary", temperature="per_head")
    tokens_TB, labels_TB, starts_BT = packed(1)
    loss, entropies_BNT = transformer(tokens_TB, labels_TB, starts_BT)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    transformer.zero_grad()
    alone = torch.zeros((), dtype=torch.float64)
    for start, length in zip(starts_BT[0].unique().tolist(), LENGTHS, strict=True):
        here = slice(start, start + length)
        own, own_entropies_BNT = transformer(tokens_TB[here], labels_TB[here])
        alone = alone + own
        for together_BNT, own_BNT in zip(entropies_BNT, own_entropies_BNT, strict=True):
            torch.testing.assert_close(together_BNT[..., here], own_BNT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, alone, check_dtype=False)
    alone.backward()
    for name, parameter in transformer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert (transformer(tokens_TB, labels_TB)[0] - loss).abs() > 1e-3  # the switch does something


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_other_documents_leave_no_trace(positions: str) -> None:
    """Learned positions and temperatures are those of the packed sequence, yet no token sees another document."""
    transformer = model(positions=positions)
    tokens_TB, _, starts_BT = packed(2)
    before, _ = transformer(tokens_TB, None, starts_BT)
    changed_TB = tokens_TB.clone()
    changed_TB[6:13] = (changed_TB[6:13] + 1) % VOCAB_SIZE  # the third document
    after, _ = transformer(changed_TB, None, starts_BT)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[13:], after[13:])
    assert (before[6:13] != after[6:13]).any(-1).all()
