"""What a model is made of: published architecture names, the ingredients behind each, and every size.

    ModelConfig(architecture="EReg(SM(t)+ScFuFFN)", num_layers=12, ...).resolved()

A name fixes all ingredients; an ingredient set by itself (say `activation="relu"`) overrides the name's choice. Source
of the names: arXiv 2501.03489, sections 3 and 4.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

NORMALIZED_PLACEMENTS = ("none", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN")

_PLAIN: dict[str, Any] = {
    "norm": "none",
    "activation": "identity",
    "fused_ffn": False,
    "scaled_ffn": False,
    "temperature": "none",
    "weight_norm": "none",
    "spectral_norm": "none",
    "regularized": False,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "SM+LN+G": {**_PLAIN, "norm": "layernorm", "activation": "gelu"},
    "SM+LN+R": {**_PLAIN, "norm": "layernorm", "activation": "relu"},
    "SM+LN": {**_PLAIN, "norm": "layernorm"},
    "SM+G": {**_PLAIN, "activation": "gelu"},
    "SM+R": {**_PLAIN, "activation": "relu"},
    "SM": {**_PLAIN},
    "SM+WN": {**_PLAIN, "weight_norm": "FFN"},
    "SM+SN": {**_PLAIN, "spectral_norm": "FFN"},
    "SM+ScFFN": {**_PLAIN, "scaled_ffn": True},
    "SM+ScFuFFN": {**_PLAIN, "scaled_ffn": True, "fused_ffn": True},
    "SM(t)+ScFuFFN": {**_PLAIN, "scaled_ffn": True, "fused_ffn": True, "temperature": "per_position"},
    "EReg(SM(t)+ScFuFFN)": {
        **_PLAIN,
        "scaled_ffn": True,
        "fused_ffn": True,
        "temperature": "per_position",
        "regularized": True,
    },
}

LARGEST_SIZES = {
    "num_layers": 10_000,
    "hidden_size": 10**6,
    "num_attention_heads": 10**6,
    "seq_length": 10**9,
    "ffn_hidden_size": 10**8,
}
"""Beyond these counting parameters takes minutes, or a tensor has more bytes than 64 bits can say."""


def explained(default: Any, text: str) -> Any:
    """A field of a configuration: its default, and what it means."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and ingredients of one model; `None` in an ingredient means "as the architecture's name says"."""

    architecture: str = explained(
        "EReg(SM(t)+ScFuFFN)", "Published name that fixes every ingredient below that is left at null."
    )
    num_layers: int = explained(12, "Transformer blocks; the paper uses 12 and 18.")
    hidden_size: int = explained(768, "Model width D in features.")
    num_attention_heads: int = explained(12, "Attention heads N a layer; the head width is hidden_size / N.")
    seq_length: int = explained(128, "Context T in tokens; fixes learned positions and per-position temperatures.")
    ffn_hidden_size: int | None = explained(
        None, "Width between the two FFN matrices in features; null means 4 * hidden_size; unused by a fused FFN."
    )
    norm: Literal["layernorm", "none"] | None = explained(
        None,
        "Normalization before attention and before the FFN (LN1, LN2); 'none' saves the costliest step of private "
        "inference.",
    )
    activation: Literal["gelu", "relu", "identity"] | None = explained(
        None, "FFN activation; 'identity' makes the FFN linear."
    )
    fused_ffn: bool | None = explained(
        None, "One D x D matrix instead of two, possible since a linear FFN is one linear map; 8 times fewer FLOPs."
    )
    scaled_ffn: bool | None = explained(
        None,
        "Learnable beta on the residual and 1/alpha on the FFN (paper Eq. 8), which keeps norm-free nets trainable.",
    )
    temperature: Literal["none", "per_head", "per_position"] | None = explained(
        None, "Learnable softmax temperature: none, one a head, or one a head and query position (the paper's H x T)."
    )
    temperature_form: Literal["exp", "raw"] = explained(
        "exp",
        "'exp' trains ln(t / temperature_init) and so keeps t positive, and finely resolved in bf16; 'raw' trains t "
        "itself as in the paper, where it can cross zero.",
    )
    temperature_init: float = explained(
        0.01,
        "Initial t (unitless divisor of the logits): 0.01 on CodeParrot, 0.1 on Languini; lifts tiny norm-free logits.",
    )
    weight_norm: Literal["none", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"] | None = explained(
        None, "Linears whose weight is g V/||V|| per output row."
    )
    spectral_norm: Literal["none", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"] | None = explained(
        None, "Linears whose weight is divided by its largest singular value."
    )
    regularized: bool | None = explained(None, "Whether heads carry learnable entropy thresholds for the regularizer.")
    threshold_init: float = explained(
        0.5, "Initial threshold theta as a fraction of ln T; trained values in the paper lie between 0.20 and 0.52."
    )
    final_norm: bool = explained(
        True, "LayerNorm after the last block, which the authors keep; false makes the network strictly softmax-only."
    )
    tied_head: bool = explained(True, "Share the word embedding with the output head, as GPT-2 does.")
    positions: Literal["learned", "rotary"] = explained(
        "learned", "Learned absolute positions (the paper) or rotary ones."
    )
    init_std: float = explained(0.02, "Standard deviation of the normal initialization of every matrix.")
    initialization: Literal["scaled", "paper"] = explained(
        "scaled",
        "'paper' draws every matrix with init_std and starts alpha at 1; 'scaled' is the same up to 12 layers of width "
        "768, and beyond keeps a norm-free residual from growing faster (see model/initialize.py).",
    )

    def resolved(self) -> "ModelConfig":
        """Fills every ingredient left at None from the architecture's table row; an unknown name is a KeyError."""
        defaults = ARCHITECTURES[self.architecture]
        filled = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.ffn_hidden_size is None:
            filled["ffn_hidden_size"] = 4 * self.hidden_size
        return dataclasses.replace(self, **filled)

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_holds_residual(self) -> bool:
        """Whether the FFN sub-block is one matrix, its residual included: it is linear, and the residual its input."""
        return bool(self.fused_ffn) and self.norm == "none"

    def faults(self) -> list[str]:
        """Every reason why no such model exists, each a line with the numbers and the remedy; empty if sound."""
        if self.architecture not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            return [f"model.architecture = {self.architecture!r} is unknown; choose one of: {names}"]
        faults = []
        for name, most in LARGEST_SIZES.items():
            value, null = getattr(self, name), ", or null for 4 * hidden_size" if name == "ffn_hidden_size" else ""
            if value is not None and not 1 <= value <= most:
                faults.append(f"model.{name} = {value} must be at least 1 and at most {most:,}{null}")
        if faults:
            return faults
        if self.hidden_size % self.num_attention_heads:
            faults.append(
                f"model.hidden_size = {self.hidden_size} is not a multiple of model.num_attention_heads = "
                f"{self.num_attention_heads}; change one of them"
            )
        elif self.positions == "rotary" and self.head_width % 2:
            faults.append(
                f"model.positions = 'rotary' needs an even head width, not {self.head_width}; change hidden_size or "
                "num_attention_heads"
            )
        model = self.resolved()
        if model.fused_ffn and model.activation != "identity":
            faults.append(
                f"model.fused_ffn = true needs model.activation = 'identity', not {model.activation!r}: only a "
                f"linear FFN "
                "is one matrix"
            )
        if model.weight_norm != "none" and model.spectral_norm != "none":
            faults.append(
                "model.weight_norm and model.spectral_norm are both set; choose one and leave the other 'none'"
            )
        if self.temperature_init <= 0:
            faults.append(f"model.temperature_init = {self.temperature_init} must be positive: it divides the logits")
        if not 0 <= self.threshold_init <= 1:
            faults.append(
                f"model.threshold_init = {self.threshold_init} must lie in [0, 1]: it is a fraction of ln T, the "
                "largest entropy that a head can have"
            )
        if self.init_std <= 0:
            faults.append(f"model.init_std = {self.init_std} must be positive")
        return faults
