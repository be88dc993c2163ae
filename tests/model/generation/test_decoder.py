"""Generation with a cache against forward passes over whole sequences, for every architecture, in float64."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from model.config import ARCHITECTURES, ModelConfig
from model.generation.decoder import Decoder, generate
from model.generation.sampling import GREEDY, Sampling
from model.transformer import Transformer
from tests.model.comparison import build
from tests.model.reference import Sizes

SIZES = Sizes()
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
STEPS = SIZES.context - max(map(len, PROMPTS))
CHOICES: dict[str, dict[str, object]] = {
    **{name: {"architecture": name} for name in ARCHITECTURES},
    "rotary": {"positions": "rotary"},
    "rotary with a temperature per head": {"positions": "rotary", "temperature": "per_head"},
    "raw temperatures": {"temperature_form": "raw"},
    "untied, no final norm": {"tied_head": False, "final_norm": False},
    "spectral norms of attention": {"architecture": "SM+SN", "spectral_norm": "QKVO+FFN"},
}


def whole_passes(model: Transformer, sequences: list[list[int]]) -> Tensor:
    """The logits after each sequence [B, V], one sequence at a time, without padding or a cache."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor(each).unsqueeze(1))[0][-1, 0] for each in sequences])


@pytest.mark.parametrize("name", CHOICES)
def test_every_token_has_the_logits_of_a_whole_pass(name: str) -> None:
    """Prompts of three lengths in one batch, up to the last position of the model; the tokens are arbitrary."""
    model = build(ModelConfig(**CHOICES[name]), SIZES)  # type: ignore[arg-type]
    decoder, sequences = Decoder(model, SIZES.context), [list(prompt) for prompt in PROMPTS]
    logits_BV = decoder.read(PROMPTS)
    torch.testing.assert_close(logits_BV, whole_passes(model, sequences), rtol=1e-10, atol=1e-12)
    new_SB = torch.randint(SIZES.vocabulary, (STEPS, len(PROMPTS)), generator=torch.Generator().manual_seed(0))
    for new_B in new_SB:
        for sequence, token in zip(sequences, new_B.tolist(), strict=True):
            sequence.append(token)
        logits_BV = decoder.step(new_B)
        torch.testing.assert_close(logits_BV, whole_passes(model, sequences), rtol=1e-10, atol=1e-12)
    assert max(map(len, sequences)) == SIZES.context


def greedy_without_cache(model: Transformer, prompt: list[int], new_tokens: int, end: int | None) -> list[int]:
    sequence = list(prompt)
    for _ in range(new_tokens):
        sequence.append(int(whole_passes(model, [sequence]).argmax()))
        if sequence[-1] == end:
            break
    return sequence[len(prompt) :]


def of_each(steps: list[list[int | None]]) -> list[list[int]]:
    return [[token for token in column if token is not None] for column in zip(*steps, strict=True)]


def test_greedy_generation_is_the_arg_max_of_whole_passes_and_ends() -> None:
    model = build(ModelConfig(), SIZES, seed=3)
    free = [greedy_without_cache(model, prompt, STEPS, None) for prompt in PROMPTS]
    assert of_each(list(generate(model, PROMPTS, STEPS, GREEDY))) == free
    end = free[0][1]
    expected = [greedy_without_cache(model, prompt, STEPS, end) for prompt in PROMPTS]
    steps = list(generate(model, PROMPTS, STEPS, GREEDY, end=end))
    assert of_each(steps) == expected and len(steps) == max(map(len, expected))
    assert any(len(each) < STEPS for each in expected), "one of them ended"


def test_a_seed_repeats_whatever_the_batch() -> None:
    model, sampling = build(ModelConfig(), SIZES), Sampling(temperature=1.3)
    together = of_each(list(generate(model, PROMPTS, STEPS, sampling, seed=5)))
    assert together == of_each(list(generate(model, PROMPTS, STEPS, sampling, seed=5)))
    assert together != of_each(list(generate(model, PROMPTS, STEPS, sampling, seed=6)))
    alone = [of_each(list(generate(model, [p], STEPS, sampling, seed=5, first=n)))[0] for n, p in enumerate(PROMPTS)]
    assert together == alone
    same = of_each(list(generate(model, [PROMPTS[0]] * 4, STEPS, sampling, seed=5)))
    assert len(set(map(tuple, same))) > 1, "equal prompts of a batch draw numbers of their own"


def test_nothing_of_the_model_changes() -> None:
    model = build(ModelConfig(architecture="SM+WN"), SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(itertools.islice(generate(model, PROMPTS, STEPS, GREEDY), 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused() -> None:
    model = build(ModelConfig(), SIZES)
    with pytest.raises(ValueError, match=rf"{SIZES.context + 1} tokens do not fit the model's seq_length = "):
        next(generate(model, PROMPTS, STEPS + 1, GREEDY))
    with pytest.raises(ValueError, match="prompt 8 is empty\nprompt 9 has tokens outside 0 to"):
        next(generate(model, [[1], [], [SIZES.vocabulary]], 1, GREEDY, first=7))
    with pytest.raises(ValueError, match=r"top_p = 0 must lie in \(0, 1\]"):
        next(generate(model, [[1]], 1, dataclasses.replace(GREEDY, top_p=0)))
    with torch.no_grad():
        model.head.weight[1] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are not finite: its weights are lost"):
        next(generate(model, [[2]], 1, Sampling()))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["EReg(SM(t)+ScFuFFN)", "SM+LN+G", "rotary", "rotary with a temperature per head"])
def test_tokens_on_a_gpu_have_the_logits_of_a_whole_pass(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Prompts go through the kernels, single tokens do not."""
    model = build(ModelConfig(**CHOICES[name]), SIZES).to("cuda", dtype)  # type: ignore[arg-type]
    decoder, sequences = Decoder(model, SIZES.context), [list(prompt) for prompt in PROMPTS]
    logits_BV = decoder.read(PROMPTS)
    for _ in range(STEPS):
        with torch.no_grad():
            whole_BV = torch.stack([model(torch.tensor(s, device="cuda").unsqueeze(1))[0][-1, 0] for s in sequences])
        assert (logits_BV - whole_BV).abs().max() < tolerance * whole_BV.abs().max()
        token_B = whole_BV.argmax(-1)
        for sequence, token in zip(sequences, token_B.tolist(), strict=True):
            sequence.append(token)
        logits_BV = decoder.step(token_B)


@pytest.mark.gpu
def test_a_seed_gives_the_same_tokens_on_a_gpu() -> None:
    model, sampling = build(ModelConfig(), SIZES), Sampling(temperature=0.9, top_k=20, top_p=0.95)
    on_cpu = list(generate(model, PROMPTS, STEPS, sampling, seed=5))
    assert on_cpu == list(generate(model.cuda(), PROMPTS, STEPS, sampling, seed=5))
