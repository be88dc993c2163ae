"""A standard GPT-2 to measure against: LayerNorm, GELU, PyTorch's attention, full logits, no biases.

It is what a user would train otherwise: plain PyTorch under autocast, compiled, with fused AdamW and clipping.

Tensor names carry their shape: B sequences, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import Config


class PeerBlock(nn.Module):
    """A pre-norm block of GPT-2 with GELU and without entropies."""

    def __init__(self, width: int, heads: int, ffn_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn_width, bias=False), nn.GELU(), nn.Linear(ffn_width, width, bias=False)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.query_key_value(self.attention_norm(x_BTD))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.output(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class PeerModel(nn.Module):
    """Computes the mean cross-entropy of next tokens."""

    def __init__(self, config: Config, padded_vocab_size: int) -> None:
        super().__init__()
        model = config.model
        width = model.hidden_size
        self.word = nn.Embedding(padded_vocab_size, width)
        self.position = nn.Embedding(model.seq_length, width)
        self.blocks = nn.ModuleList(
            PeerBlock(width, model.num_attention_heads, model.ffn_hidden_size or 4 * width)
            for _ in range(model.num_layers)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTD = self.word(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.word.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


class Peer:
    """The model with its optimizer, at learning rate 0."""

    def __init__(self, config: Config, padded_vocab_size: int, device: torch.device) -> None:
        torch.manual_seed(config.training.seed)
        on_gpu = device.type == "cuda"
        self.model = PeerModel(config, padded_vocab_size).to(device)
        self.loss = torch.compile(self.model) if on_gpu else self.model
        self.clipping = config.optimizer.gradient_clipping
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            weight_decay=config.optimizer.weight_decay,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            fused=on_gpu,
        )

    def train_step(self, tokens_TB: Tensor, labels_TB: Tensor) -> Tensor:
        """Train one step on a batch in this project's layout, [T, B]. Return the loss."""
        with self.autocast:
            loss = self.loss(tokens_TB.t().contiguous(), labels_TB.t().contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
