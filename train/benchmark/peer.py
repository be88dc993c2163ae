"""A standard GPT-2 to measure against: LayerNorm, GELU, PyTorch's attention, full logits, no biases.

It is what a user would train otherwise: plain PyTorch in bf16, compiled, with fused AdamW and clipping. Over several
ranks it is parallelized by PyTorch alone, as torchtitan does it.

Tensor names carry their shape: B sequences, T tokens, D width, N heads, H head width, V vocabulary.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.micro_batch import MicroBatch
from train.config import Config

FORMS = {
    "whole": "one process, compiled as one graph",
    "one": "one process, compiled block by block as the forms over several ranks are",
    "DDP": "DistributedDataParallel",
    "FSDP2": "fully_shard around each block: parameters, gradients and optimizer are sharded",
    "TP": "DTensor: tensor parallelism with sequence parallelism, and a cross-entropy over the sharded vocabulary",
}
"""How the model is parallelized."""


class PeerBlock(nn.Module):
    """A pre-norm block of GPT-2 with GELU and without entropies.

    Query, key and value are stacked head by head, so a range of heads is a range of the matrix's rows.
    """

    def __init__(self, width: int, heads: int, ffn_width: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn_width, bias=False), nn.GELU(), nn.Linear(ffn_width, width, bias=False)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv_BTN3H = self.query_key_value(self.attention_norm(x_BTD)).unflatten(2, (-1, 3, self.head_width))
        q_BNTH, k_BNTH, v_BNTH = (part.transpose(1, 2) for part in qkv_BTN3H.unbind(3))
        mixed_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        x_BTD = x_BTD + self.output(mixed_BNTH.transpose(1, 2).flatten(2))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class PeerModel(nn.Module):
    """Computes the mean cross-entropy of next tokens. The head is the word embedding."""

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
        self.cross_entropy = cross_entropy

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the values of parameters that have none."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else nn.init.ones_(parameter)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        positions_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.word(tokens_BT) + self.position(positions_1T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.cross_entropy(self.norm(x_BTD), self.word.weight, labels_BT)


def cross_entropy(x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the logits x W^T, in nats."""
    logits_BTV = F.linear(x_BTD, weight_VD).float()  # as autocast does; FSDP2 runs without it
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


@dataclass(frozen=True)
class PeerReport:
    """A step's loss, in nats a token, of this rank's sequences; the device may still be computing it."""

    loss: Tensor

    @property
    def accepted(self) -> Tensor:
        return self.loss.isfinite()

    @property
    def cross_entropy(self) -> float:
        return float(self.loss)

    def wait(self) -> "PeerReport":
        """Return the report of all ranks: the loss is their mean."""
        mean = self.loss.clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return PeerReport(mean)


class Peer:
    """The model with its optimizer, at learning rate 0.

    Args:
        form: one of FORMS. Those over several ranks need a process group.
        micro_batches: in a step, on this rank.
    """

    def __init__(
        self, config: Config, padded_vocab_size: int, device: torch.device, form: str = "whole", micro_batches: int = 1
    ) -> None:
        torch.manual_seed(config.training.seed)
        self.form, self.micro_batches = form, micro_batches
        on_gpu = device.type == "cuda"
        with torch.device("meta"):
            self.model: nn.Module = PeerModel(config, padded_vocab_size)
        self.model.to_empty(device=device)
        self.model.initialize()  # type: ignore[operator]
        self.call: nn.Module = parallelized(self.model, form, device, compiles=on_gpu)  # type: ignore[arg-type]
        self.clipping = config.optimizer.gradient_clipping
        # FSDP2 casts by itself
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu and form != "FSDP2")
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            weight_decay=config.optimizer.weight_decay,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            fused=on_gpu,
        )

    def train_step(self, batches: Iterable[MicroBatch]) -> PeerReport:
        """Train one step on the next micro-batches, in this project's layout, [T, B]."""
        total: Tensor | None = None
        for index, batch in zip(range(self.micro_batches), batches, strict=False):
            with self._exchange(is_last=index == self.micro_batches - 1):
                with self.autocast:
                    tokens_TB, labels_TB = batch.tensors
                    loss = self.call(tokens_TB.t().contiguous(), labels_TB.t().contiguous()) / self.micro_batches
                loss.backward()
            part = loss.detach()
            part = part.full_tensor() if isinstance(part, DTensor) else part
            total = part if total is None else total + part
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert total is not None
        return PeerReport(total)

    @contextlib.contextmanager
    def _exchange(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients after a step's last micro-batch only."""
        with contextlib.ExitStack() as stack:
            if self.form == "DDP" and not is_last:
                stack.enter_context(self.call.no_sync())  # type: ignore[operator]
            if self.form == "FSDP2":
                self.call.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            if self.form == "TP":
                from torch.distributed.tensor.parallel import loss_parallel

                stack.enter_context(loss_parallel())
            yield


def parallelized(model: PeerModel, form: str, device: torch.device, compiles: bool) -> nn.Module:
    """Compile and parallelize a model in place; return what is to be called."""
    if form == "whole":
        return torch.compile(model) if compiles else model  # type: ignore[return-value]
    if form == "TP":
        shard_over_tensor_ranks(model, device)
    if compiles:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)  # hooks of FSDP2 stay outside
        if form != "TP":
            model.cross_entropy = torch.compile(cross_entropy)
    if form == "DDP":
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if form == "FSDP2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy()
        if device.type == "cuda":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def shard_over_tensor_ranks(model: PeerModel, device: torch.device) -> None:
    """Shard a model's matrices over all ranks, and positions between the matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh, positions = init_device_mesh(device.type, (dist.get_world_size(),)), Shard(1)
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=positions)
    parallelize_module(model, mesh, {"word": embedding, "position": embedding, "norm": SequenceParallel()})
    for block in model.blocks:
        plan = {
            "attention_norm": SequenceParallel(),
            "query_key_value": ColwiseParallel(input_layouts=positions),
            "output": RowwiseParallel(output_layouts=positions),
            "ffn_norm": SequenceParallel(),
            "ffn.0": ColwiseParallel(input_layouts=positions),
            "ffn.2": RowwiseParallel(output_layouts=positions),
        }
        parallelize_module(block, mesh, plan)

    def sharded_cross_entropy(x_BTD: DTensor, weight_VD: DTensor, labels_BT: Tensor) -> Tensor:
        return cross_entropy(x_BTD.redistribute(placements=[Replicate()]), weight_VD, labels_BT)

    model.cross_entropy = sharded_cross_entropy  # type: ignore[assignment]
