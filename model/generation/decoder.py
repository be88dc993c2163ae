"""Generate tokens, keeping the keys and values of earlier positions.

Sequences of different lengths form a batch. Column c of the cache belongs to position c of every sequence, so learned
positions, rotary angles and per-position temperatures mean what they meant in training. Prompts are read by the model's
own forward pass, padded at their ends: no position looks at a later one. A generated token then takes the column of the
padding, which no query has looked at.

Tensor names carry their shape: T tokens of a sequence, B sequences, D model width, N heads, H head width, V vocabulary,
C columns of the cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.generation.sampling import Sampling, next_token
from model.initialize import generator
from model.rotary import rotate
from model.transformer import Attention, Transformer


class Decoder:
    """Reads prompts, then one token of each sequence at a time, and returns the logits of what follows.

    Args:
        model: the whole model.
        capacity: C, the longest sequence in tokens.

    Raises:
        ValueError: the model has no position for so long a sequence.
    """

    def __init__(self, model: Transformer, capacity: int) -> None:
        if capacity > model.config.seq_length:
            raise ValueError(
                f"{capacity} tokens do not fit the model's seq_length = {model.config.seq_length}; give a shorter "
                "prompt or ask for fewer tokens"
            )
        assert model.embedding is not None and model.head is not None, "only a whole model generates"
        self.model, self.capacity = model, capacity
        self._embedding, self._head = model.embedding, model.head
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        """Keys and values of each layer, [B, N, C, H]."""
        self._length_B = torch.zeros(0, dtype=torch.long)
        self._longest = 0

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin a batch of sequences, each of at least one token; return the logits after each, [B, V]."""
        device = self._head.weight.device
        lengths = [len(prompt) for prompt in prompts]
        self._longest, self._length_B = max(lengths), torch.tensor(lengths, device=device)
        padded = [[*prompt, *[0] * (self._longest - len(prompt))] for prompt in prompts]
        tokens_TB = torch.tensor(padded, device=device).t()

        def attend(layer: str, attention: Attention, x_TBD: Tensor) -> Tensor:
            qkv = attention.project(x_TBD)
            _, k_TBNH, v_TBNH = qkv.unflatten(-1, (-1, 3, attention.head_width)).unbind(3)
            if attention.core.rotary:
                k_TBNH = rotate(k_TBNH)
            shape = (*k_TBNH.shape[1:3], self.capacity, attention.head_width)
            self._cache[layer] = k_TBNH.new_zeros(shape), v_TBNH.new_zeros(shape)
            for columns_BNCH, new_TBNH in zip(self._cache[layer], (k_TBNH, v_TBNH), strict=True):
                columns_BNCH[:, :, : self._longest] = new_TBNH.permute(1, 2, 0, 3)
            return attention.attend(qkv)[0]

        x_TBD = self._layers(self._embedding(tokens_TB), attend)
        last_BD = x_TBD[self._length_B - 1, torch.arange(len(prompts), device=device)]
        return self._head(last_BD)

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """Append one token to each sequence; return the logits after it, [B, V]."""
        position_1B, rows = self._length_B.unsqueeze(0), torch.arange(len(token_B), device=token_B.device)
        self._longest += 1
        hidden_BC = torch.arange(self._longest, device=token_B.device) > self._length_B.unsqueeze(1)

        def attend(layer: str, attention: Attention, x_1BD: Tensor) -> Tensor:
            qkv = attention.project(x_1BD).unflatten(-1, (-1, 3, attention.head_width))
            q_1BNH, k_1BNH, v_1BNH = qkv.unbind(3)
            if attention.core.rotary:
                q_1BNH, k_1BNH = rotate(q_1BNH, position_1B), rotate(k_1BNH, position_1B)
            for columns_BNCH, new_1BNH in zip(self._cache[layer], (k_1BNH, v_1BNH), strict=True):
                columns_BNCH[rows, :, self._length_B] = new_1BNH[0]
            k_BNCH, v_BNCH = (columns_BNCH[:, :, : self._longest] for columns_BNCH in self._cache[layer])
            temperature = attention.temperature()
            if temperature is not None and temperature.dim() == 2:  # of the query's position in its sequence
                temperature = temperature[:, self._length_B].t()
            out_BNH = attend_to_columns(q_1BNH[0], k_BNCH, v_BNCH, temperature, hidden_BC)
            return attention.merge(out_BNH.unsqueeze(0))

        x_1BD = self._layers(self._embedding(token_B.unsqueeze(0), position_1B), attend)
        self._length_B = self._length_B + 1
        return self._head(x_1BD[0])

    def _layers(self, x_TBD: Tensor, attend: Callable[[str, Attention, Tensor], Tensor]) -> Tensor:
        for layer, block in self.model.layers.items():
            x_TBD = x_TBD + attend(layer, block.attention, block.attention_norm(x_TBD))
            x_TBD = block.ffn(block.ffn_norm(x_TBD), x_TBD)
        return x_TBD


def attend_to_columns(
    q_BNH: Tensor, k_BNCH: Tensor, v_BNCH: Tensor, temperature: Tensor | None, hidden_BC: Tensor
) -> Tensor:
    """Compute the attention of one query of each sequence, [B, N, H]; the softmax is in float32 or wider.

    Args:
        temperature: [N] or [B, N], or None.
        hidden_BC: whether a query does not see a column.
    """
    exact = torch.promote_types(q_BNH.dtype, torch.float32)
    s_BNC = (k_BNCH.to(exact) @ q_BNH.to(exact).unsqueeze(-1)).squeeze(-1) / math.sqrt(q_BNH.shape[-1])
    if temperature is not None:
        s_BNC = s_BNC / temperature.to(exact).unsqueeze(-1)
    a_BNC = s_BNC.masked_fill(hidden_BC.unsqueeze(1), -math.inf).softmax(-1)
    return (a_BNC.to(v_BNCH.dtype).unsqueeze(2) @ v_BNCH).squeeze(2)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 1,
    first: int = 0,
    end: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each sequence, `new_tokens` times or until all have ended.

    Args:
        model: the whole model.
        prompts: of the sequences; each of at least one token.
        seed: of the random numbers. With the same seed, a prompt of the same number gives the same tokens in any batch.
        first: number of the first prompt, if the prompts are a part of more.
        end: the token that ends a sequence; None if there is none.

    Yields:
        A token for each sequence, or None for one that has ended. `end` itself is yielded.

    Raises:
        ValueError: a prompt is empty or has tokens that the model does not know, the sequences would be longer than
            the model's seq_length, `sampling` has faults, or the logits after the prompts are not finite.
    """
    faults = sampling.faults()
    faults += [f"prompt {first + index} is empty" for index, prompt in enumerate(prompts) if not prompt]
    faults += [
        f"prompt {first + index} has tokens outside 0 to {model.vocab_size - 1}"
        for index, prompt in enumerate(prompts)
        if not all(0 <= token < model.vocab_size for token in prompt)
    ]
    if faults:
        raise ValueError("\n".join(faults))
    decoder = Decoder(model, max(map(len, prompts)) + new_tokens)
    uniform_SB = torch.stack(
        [
            torch.rand(new_tokens, dtype=torch.float64, generator=generator(seed, f"prompt/{first + index}"))
            for index in range(len(prompts))
        ],
        dim=1,
    ).to(next(model.parameters()).device)
    has_ended = [False] * len(prompts)
    logits_BV = decoder.read(prompts)
    if not logits_BV.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are lost; take an earlier checkpoint")
    for number, uniform_B in enumerate(uniform_SB):
        token_B = next_token(logits_BV, sampling, uniform_B)
        tokens = token_B.tolist()
        yield [None if ended else token for token, ended in zip(tokens, has_ended, strict=True)]
        has_ended = [ended or token == end for token, ended in zip(tokens, has_ended, strict=True)]
        if all(has_ended) or number + 1 == new_tokens:
            return
        logits_BV = decoder.step(token_B)
