"""Lists the runs: which layouts are trained on how many devices, and their references."""

from dataclasses import dataclass

from parallel.layout import Layout, parse_layout

FAMILIES: dict[str, list[str]] = {
    "EReg": [],
    "per_head": ["regularizer.granularity=per_head"],
    "untied": ["model.tied_head=false"],
    "SM+LN+G": ["model.architecture=SM+LN+G"],
    "split FFN": ["parallel.fused_ffn=split"],
}
"""Family -> overrides. All layouts of a family compute the same function."""
OWN_REFERENCE = ("EReg", "per_head", "untied", "SM+LN+G")
"""Families that are models of their own. The others are the first family under another layout."""

ARITHMETICS = ("truth", "trained")
"""Of the references: plain float32, and bf16 as training runs it, compiled and with CUDA graphs."""

LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"EReg": ["recompute=selective", "recompute=full", "zero=3"]},
    2: {
        "EReg": [
            "dp=2",
            "dp=2:zero=2",
            "dp=2:zero=3",
            "tp=2",
            "tp=2:sp=1",
            "pp=2",
            "cp=2",
            "dp=2:zero=3:recompute=full",
            "tp=2:sp=1:recompute=selective",
            "cp=2:recompute=full",
        ],
        "split FFN": ["tp=2:sp=1"],
        "per_head": ["dp=2", "tp=2:sp=1"],
        "untied": ["pp=2"],
        "SM+LN+G": ["tp=2:sp=1", "dp=2:zero=3"],
    },
    4: {
        "EReg": [
            "dp=4:zero=3",
            "tp=4:sp=1",
            "pp=4",
            "cp=4",
            "tp=2:dp=2",
            "tp=2:dp=2:zero=3",
            "tp=2:pp=2:sp=1",
            "dp=2:cp=2",
            "dp=2:cp=2:zero=3",
            "pp=2:dp=2",
            "pp=2:cp=2",
            "tp=2:cp=2:sp=1",
        ],
        "per_head": ["dp=2:cp=2", "pp=2:dp=2"],
        "untied": ["tp=2:pp=2"],
        "SM+LN+G": ["tp=2:dp=2:sp=1:zero=2"],
    },
    8: {
        "EReg": [
            "dp=8:zero=3",
            "tp=2:pp=2:dp=2:sp=1",
            "tp=2:dp=2:cp=2:sp=1",
            "tp=2:dp=4:zero=3",
            "tp=2:pp=2:cp=2:sp=1:recompute=full",
            "pp=4:dp=2",
            "tp=8:sp=1",
        ],
        "per_head": ["tp=2:dp=2:cp=2"],
    },
}
"""Number of devices -> family -> layouts."""

KEYS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "zero": "zero_stage",
}


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        arithmetic: one of ARITHMETICS.
    """

    family: str
    layout: Layout
    arithmetic: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.arithmetic if self.is_reference else self.layout}"

    @property
    def is_reference(self) -> bool:
        return self.layout == Layout()

    @property
    def reference_family(self) -> str:
        return self.family if self.family in OWN_REFERENCE else OWN_REFERENCE[0]

    def overrides(self, micro_batch_size: int) -> list[str]:
        """Return the overrides of this run.

        The number of micro-batches is the same under every layout, since `per_head` depends on micro_batch_size * dp.
        """
        layout = self.layout
        keys = [f"parallel.{key}={getattr(layout, short)}" for short, key in KEYS.items()]
        keys += [
            f"parallel.sequence_parallel={'true' if layout.sp else 'false'}",
            f"training.micro_batch_size={micro_batch_size // layout.dp}",
            f"training.activation_recompute={layout.recompute}",
        ]
        if self.arithmetic == "truth":
            keys += ["training.precision=fp32", "training.compile=off"]
        else:
            keys += ["training.precision=bf16", "training.compile=on"]
        return keys + FAMILIES[self.family]


def cases(devices: int) -> list[Case]:
    """Return the references, then every layout that fits on `devices` devices, the smallest first."""
    layouts = [
        Case(family, parse_layout(text), "trained")
        for size, families in LAYOUTS.items()
        if size <= devices
        for family, texts in families.items()
        for text in texts
    ]
    return with_references(layouts)


def with_references(layouts: list[Case]) -> list[Case]:
    """Return the references that the runs need, each once, then the runs."""
    families = dict.fromkeys(case.reference_family for case in layouts)
    references = [Case(family, Layout(), arithmetic) for family in families for arithmetic in ARITHMETICS]
    return references + layouts
