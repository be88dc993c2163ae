"""Training state under global parameter names, independent of the layout that holds it.

ZeRO keeps of each parameter's float32 master copy and Adam moments a contiguous piece of the flattened local tensor on
each data-parallel rank; tensor parallelism makes the local tensor a slice of the whole. A `Piece` records both cuts, so
that the whole tensor can be put together from any layout's pieces and cut again for any other:

    whole [rows, columns]  --tensor parallel-->  local shard  --flatten, ZeRO-->  piece [start, start + length)

The pieces of all ranks cover every parameter exactly once: of what several ranks hold, one records it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.initialize import TIED_HEAD_SOURCE, named_parameters
from model.normalized_weights import update_spectral_norms
from parallel.megatron import Groups
from parallel.tensor import cut

MOMENTS = ("exp_avg", "exp_avg_sq")
POWER_ITERATIONS_AFTER_RESHARDING = 30


@dataclass
class Piece:
    """Views of this rank's piece of one parameter's master copy and Adam moments, each [length]."""

    start: int
    master: Tensor
    moments: dict[str, Tensor]


def save_pieces(stage: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups) -> dict[str, Any]:
    """What this rank contributes to a checkpoint: plain tensors, numbers and strings."""
    grid, pieces = groups.grid, []
    for name, parameter in named_parameters(stage.transformer):
        piece = piece_of(parameter, optimizer, groups)
        if piece is None or _recorded_elsewhere(name, parameter, stage, groups):
            continue
        pieces.append(
            {
                "name": name,
                "shape": list(local_shape(parameter)),
                "split_dim": parameter.partition_dim,
                "shard": grid.tp_rank if parameter.partition_dim is not None else 0,
                "start": piece.start,
                "master": piece.master.detach().cpu(),
                **{key: value.detach().cpu() for key, value in piece.moments.items()},
            }
        )
    buffers = {name: buffer.cpu() for name, buffer in stage.transformer.named_buffers()} if grid.replica == 0 else {}
    return {"pieces": pieces, "buffers": buffers, "tp": [grid.tp_rank, grid.tp], "adam_step": adam_step(optimizer)}


class SavedState:
    """The saved pieces of all ranks, looked up by name; tensors may be memory-mapped and are read when asked for."""

    def __init__(self, saved: Iterable[dict[str, Any]]) -> None:
        self.pieces: dict[str, list[dict[str, Any]]] = {}
        self.buffers: dict[tuple[str, int, int], Tensor] = {}
        self.adam_step = 0.0
        for rank_state in saved:
            self.adam_step = rank_state["adam_step"]
            for piece in rank_state["pieces"]:
                self.pieces.setdefault(piece["name"], []).append(piece)
            for name, buffer in rank_state["buffers"].items():
                self.buffers[(name, *rank_state["tp"])] = buffer

    def whole(self, name: str, kind: str = "master") -> Tensor:
        """The whole tensor in float32; `kind` is 'master' or one of the moments.

        Raises:
            KeyError: pieces are missing.
        """
        pieces = self.pieces[name]
        shards: dict[int, Tensor] = {}
        filled = 0
        for piece in pieces:
            flat = shards.setdefault(piece["shard"], torch.empty(torch.Size(piece["shape"]).numel()))
            flat[piece["start"] : piece["start"] + piece[kind].numel()] = piece[kind]
            filled += piece[kind].numel()
        if filled != sum(shard.numel() for shard in shards.values()):
            raise KeyError(
                f"{name}: {filled} of {sum(shard.numel() for shard in shards.values())} values of {kind} found"
            )
        tensors = [shards[shard].view(pieces[0]["shape"]) for shard in sorted(shards)]
        split_dim = pieces[0]["split_dim"]
        return tensors[0] if split_dim is None else torch.cat(tensors, dim=split_dim)


@torch.no_grad()
def load_weights(stage: nn.Module, groups: Groups, saved: SavedState, vocab_size: int) -> None:
    """Fills a stage's weights of any layout; not for ZeRO-3, whose weights are partitioned."""
    shard = cut(stage.transformer, groups)
    for name, parameter in named_parameters(stage.transformer):
        parameter.copy_(_local(saved.whole(source(name, stage)), name, parameter, shard, vocab_size))
    _load_buffers(stage, groups, saved)


@torch.no_grad()
def load_pieces(stage: nn.Module, wrapper: Any, groups: Groups, saved: SavedState, vocab_size: int) -> None:
    """Fills weights, master copies and moments of this rank's layout, whatever the layout that saved them.

    Args:
        wrapper: DeepSpeed's optimizer around AdamW.

    Raises:
        KeyError: a parameter or a part of it was not saved.
    """
    create_moments(wrapper, saved.adam_step)
    optimizer = wrapper.optimizer
    shard = cut(stage.transformer, groups)
    for name, parameter in named_parameters(stage.transformer):
        piece = piece_of(parameter, optimizer, groups)
        local = _local(saved.whole(source(name, stage)), name, parameter, shard, vocab_size)
        if piece is not None:
            window = slice(piece.start, piece.start + piece.master.numel())
            piece.master.copy_(local.flatten()[window])
            for kind in MOMENTS:
                moment = _local(saved.whole(source(name, stage), kind), name, parameter, shard, vocab_size)
                piece.moments[kind].copy_(moment.flatten()[window])
        if hasattr(parameter, "ds_tensor"):
            if piece is not None:
                parameter.ds_tensor[: piece.master.numel()].copy_(piece.master)
        else:
            parameter.copy_(local)
    _load_buffers(stage, groups, saved)


def piece_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, groups: Groups) -> Piece | None:
    """This data-parallel rank's piece of a parameter, or None where it holds none."""
    if hasattr(parameter, "ds_tensor"):
        return _piece_of_stage_3(parameter, groups)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    moments = {
        kind: optimizer.state[flat][kind].narrow(0, address.start, address.numel)
        for kind in MOMENTS
        if kind in optimizer.state[flat]
    }
    return Piece(mapping.lp_fragment_address.start, mapping.hp_fragment, moments)


def _piece_of_stage_3(parameter: nn.Parameter, groups: Groups) -> Piece | None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    size = parameter.ds_tensor.ds_numel
    start = groups.grid.replica * size
    length = min(size, parameter.ds_numel - start)
    if length <= 0:
        return None
    moments = {kind: safe_get_local_optimizer_state(parameter, kind).flatten()[:length] for kind in MOMENTS}
    return Piece(start, safe_get_local_fp32_param(parameter).flatten()[:length], moments)


def create_moments(wrapper: Any, adam_step: float) -> None:
    """Gives every flat master copy Adam's state at `adam_step`, which torch would create at the first step."""
    optimizer = wrapper.optimizer
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for flat in flat_masters(wrapper):
        state = optimizer.state[flat]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32, device=flat.device if on_device else "cpu")


def flat_masters(wrapper: Any) -> list[Tensor]:
    """This rank's flat float32 partitions; ZeRO-3 hands them to AdamW only while it steps."""
    groups = wrapper.optimizer.param_groups
    return getattr(wrapper, "fp32_partitioned_groups_flat", [flat for group in groups for flat in group["params"]])


def adam_step(optimizer: torch.optim.Optimizer) -> float:
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(steps, default=0.0)


def source(name: str, stage: nn.Module) -> str:
    """The saved name of a parameter: a tied head held apart from the embedding was saved as the embedding."""
    return TIED_HEAD_SOURCE if name == "head.weight" and stage.transformer.config.tied_head else name


def local_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _recorded_elsewhere(name: str, parameter: nn.Parameter, stage: nn.Module, groups: Groups) -> bool:
    replicated = parameter.partition_dim is None and groups.grid.tp_rank != 0
    return replicated or source(name, stage) != name


def _local(whole: Tensor, name: str, parameter: nn.Parameter, shard: Any, vocab_size: int) -> Tensor:
    """This rank's slice of a whole tensor, rows of vocabulary padding zero."""
    if name in (TIED_HEAD_SOURCE, "head.weight"):
        whole = whole[:vocab_size]
    value = shard(name, whole)
    shape = local_shape(parameter)
    if value.shape == shape:
        return value
    padded = torch.zeros(shape)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _load_buffers(stage: nn.Module, groups: Groups, saved: SavedState) -> None:
    """Power-iteration vectors: exactly where tensor parallelism is unchanged, else found again from the weights."""
    missing = False
    for name, buffer in stage.transformer.named_buffers():
        value = saved.buffers.get((name, groups.grid.tp_rank, groups.grid.tp))
        if value is None:
            missing = True
            buffer.fill_(1.0)
        else:
            buffer.copy_(value)
    if missing:
        update_spectral_norms(stage, POWER_ITERATIONS_AFTER_RESHARDING)
