"""Describes a model: published architecture names, the ingredients of each, and every size.

    ModelConfig(architecture="EReg(SM(t)+ScFuFFN)", num_layers=12, ...).resolved()

A name fixes all ingredients. An ingredient that is set by itself, such as `activation="relu"`, overrides the name's
choice. Source of the names: arXiv 2501.03489, sections 3 and 4. Two are not from there: SM+TN, with tapered norms
(model/taper.py) and an identity FFN, and EReg(SM(t)+R), with a ReLU and a temperature per head, which does not fix T.
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
    "SM+TN": {**_PLAIN, "norm": "taper"},
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
    "EReg(SM(t)+R)": {**_PLAIN, "activation": "relu", "temperature": "per_head", "regularized": True},
}

LARGEST_SIZES = {
    "num_layers": 10_000,
    "hidden_size": 10**6,
    "num_attention_heads": 10**6,
    "seq_length": 10**9,
    "ffn_hidden_size": 10**8,
}
"""Beyond these, counting parameters takes minutes, or a tensor has more bytes than a 64-bit integer can hold."""


def explained(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and ingredients of one model. An ingredient left at null is what the architecture's name says."""

    architecture: str = explained(
        "EReg(SM(t)+ScFuFFN)", "Name, which fixes every ingredient below that is left at null."
    )
    num_layers: int = explained(12, "Number of transformer blocks. The paper uses 12 and 18.")
    hidden_size: int = explained(768, "Model width D in features.")
    num_attention_heads: int = explained(12, "Attention heads N per layer. The head width is hidden_size / N.")
    seq_length: int = explained(
        128, "Context length T in tokens. Learned positions and per-position temperatures have this length."
    )
    ffn_hidden_size: int | None = explained(
        None, "Features between the two FFN matrices; null means 4 * hidden_size. A fused FFN does not use it."
    )
    norm: Literal["layernorm", "taper", "none"] | None = explained(
        None,
        "Normalization before attention and before the FFN (LN1, LN2). 'none' makes private inference cheaper, and so "
        "does 'taper': a LayerNorm that becomes a fixed affine map between optimizer.taper_start and taper_end "
        "(TaperNorm, arXiv 2602.10408).",
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "identity"] | None = explained(
        None,
        "FFN activation. 'identity' makes the FFN linear. 'gelu_tanh' is the approximation in GPT-2.",
    )
    fused_ffn: bool | None = explained(
        None, "Use one D x D matrix instead of two, with an eighth of the FLOPs. Only a linear FFN can be fused."
    )
    scaled_ffn: bool | None = explained(
        None,
        "Scale the residual by a learned beta and the FFN by a learned 1/alpha (paper Eq. 8). This keeps networks "
        "without norms trainable.",
    )
    temperature: Literal["none", "per_head", "per_position"] | None = explained(
        None, "Learned softmax temperature: none, one per head, or one per head and query position (the paper's H x T)."
    )
    temperature_form: Literal["exp", "raw"] = explained(
        "exp",
        "'exp' trains ln(t / temperature_init), which keeps t positive and well resolved in bf16. 'raw' trains t "
        "itself, as in the paper; it can cross zero.",
    )
    temperature_init: float | Literal["calibrated"] = explained(
        0.01,
        "Initial temperature t, by which logits are divided. The paper uses 0.01 on CodeParrot and 0.1 on Languini, "
        "since logits are small without norms. 'calibrated' gives each layer its own: the mean square of the layer's "
        "input. Logits then begin as large as with a LayerNorm (model/initialize.py).",
    )
    weight_norm: Literal["none", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"] | None = explained(
        None, "Linear layers with weight normalization: each output row is g V/||V||."
    )
    spectral_norm: Literal["none", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"] | None = explained(
        None, "Linear layers whose weight is divided by its largest singular value."
    )
    spectral_gain: bool = explained(
        False,
        "Multiply each spectrally normalized matrix by a learned number, which starts at 1 (sigmaReparam, arXiv "
        "2303.06296).",
    )
    regularized: bool | None = explained(
        None, "Whether the entropy regularizer acts; each head then has a learned threshold."
    )
    threshold_init: float = explained(
        0.5,
        "Initial threshold theta, as a fraction of the largest entropy: ln T, unless regularizer.target is 'causal'. "
        "Trained values in the paper lie between 0.20 and 0.52.",
    )
    final_norm: bool = explained(
        True, "LayerNorm after the last block, which the authors keep. Without it, softmax is the only nonlinearity."
    )
    tied_head: bool = explained(True, "Use the word embedding as output head, as GPT-2 does.")
    biases: Literal["query_key", "all"] = explained(
        "query_key",
        "Biases of a block: those of query and key (the paper), or also one of each matrix of attention's output and "
        "of the FFN, as in GPT-2. A value's bias would be the same as one of the output.",
    )
    positions: Literal["learned", "rotary"] = explained(
        "learned", "Learned absolute positions (the paper) or rotary ones."
    )
    init_std: float = explained(0.02, "Standard deviation of the normal distribution that initializes every matrix.")
    query_key_init_scale: float = explained(
        1.0,
        "Factor of the initial query and key matrices. Under Adam a temperature t is a factor 1/sqrt(t) both of their "
        "initial scale and of their learning rate; with this key a study takes the two apart.",
    )
    initialization: Literal["scaled", "paper"] = explained(
        "scaled",
        "'paper' draws every matrix with init_std and starts alpha at 1. 'scaled' does the same up to 12 layers of "
        "width 768; in larger networks it limits the growth of a residual without norms (model/initialize.py).",
    )

    def resolved(self) -> "ModelConfig":
        """Fill every ingredient left at None from the architecture's table row.

        Raises:
            KeyError: the architecture's name is unknown.
        """
        defaults = ARCHITECTURES[self.architecture]
        filled = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **filled, ffn_hidden_size=self.ffn_width)

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """F, the features between the two FFN matrices; a fused FFN has none."""
        return self.ffn_hidden_size if self.ffn_hidden_size is not None else 4 * self.hidden_size

    @property
    def ffn_matrix_elements(self) -> int:
        """Elements of one block's FFN matrices, of a resolved model: D x D if fused, else D x F and F x D."""
        return self.hidden_size**2 if self.fused_ffn else 2 * self.hidden_size * self.ffn_width

    @property
    def block_matrix_elements(self) -> int:
        """Elements of one block's matrices, of a resolved model: four projections of attention and the FFN."""
        return 4 * self.hidden_size**2 + self.ffn_matrix_elements

    @property
    def ffn_holds_residual(self) -> bool:
        """Whether the FFN and its residual are one matrix: the FFN is fused, and its input is the residual itself."""
        return bool(self.fused_ffn) and self.norm == "none"

    def faults(self) -> list[str]:
        """Return every reason why no such model exists, one line each with the numbers and the remedy."""
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
        if self.spectral_gain and model.spectral_norm == "none":
            faults.append(
                "model.spectral_gain = true needs model.spectral_norm: name the linear layers there, say 'QK'"
            )
        if self.temperature_init == "calibrated":
            ffn_is_normalized = str(model.spectral_norm).endswith("FFN")
            if model.norm == "none" and (model.activation in ("gelu", "gelu_tanh") or ffn_is_normalized):
                faults.append(
                    f"model.temperature_init = 'calibrated' has no closed form with model.activation = "
                    f"{model.activation!r} or with model.spectral_norm of the FFN; set a number"
                )
        elif self.temperature_init <= 0:
            faults.append(f"model.temperature_init = {self.temperature_init} must be positive: it divides the logits")
        if not 0 <= self.threshold_init <= 1:
            faults.append(
                f"model.threshold_init = {self.threshold_init} must lie in [0, 1]: it is a fraction of ln T, the "
                "largest entropy that a head can have"
            )
        for name in ("init_std", "query_key_init_scale"):
            if getattr(self, name) <= 0:
                faults.append(f"model.{name} = {getattr(self, name)} must be positive")
        return faults
