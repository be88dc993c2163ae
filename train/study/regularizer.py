"""Write the suites of the study of the regularizer: what it buys, at which learning rates, depths and lengths.

    python -m train.study.regularizer --output configs/suites/regularizer
    python -m train.study run configs/suites/regularizer/s1_rates.json --jobs 2

    s0_temperature   what a temperature does: its form, and whether its gain of scale or of learning rate helps
    s1_rates         every arm at five learning rates or seven
    s4_depth         two arms at 6, 12 and 24 layers, with short and long warm-up

`ARMS` defines what is compared. docs/study/regularizer holds the hypotheses, the text and the results.
"""

import argparse
from pathlib import Path
from typing import Any

from data.command_line import path_argument, run_command
from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.study.suite import merged

Tree = dict[str, Any]

EREG, TEMPERATURE = "EReg(SM(t)+ScFuFFN)", "SM(t)+ScFuFFN"
CALIBRATED: Tree = {"temperature_init": "calibrated"}

ARMS: dict[str, Tree] = {
    "EReg": {"model": {"architecture": EREG}},
    "SM-t": {"model": {"architecture": TEMPERATURE}},
    "SM-t-calibrated": {"model": {"architecture": TEMPERATURE, **CALIBRATED}},
    "EReg-calibrated": {"model": {"architecture": EREG, **CALIBRATED}},
    "SM+LN+G": {"model": {"architecture": "SM+LN+G"}},
    "EReg-following-rate": {"model": {"architecture": EREG}, "regularizer": {"schedule": "learning_rate"}},
    "EReg-ReLU": {"model": {"architecture": "EReg(SM(t)+R)"}},
    "TaperNorm": {"model": {"architecture": "SM+TN"}},
    "SM+LN+R": {"model": {"architecture": "SM+LN+R"}},
}
"""Models that are compared, by name: what each sets beside `BASE`."""

BASE: Tree = {
    "model": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 128},
    "data": {"path": "datasets/python16k", "planned_vocab_size": 16_384},
    "optimizer": {"schedule": "linear", "warmup_fraction": 0.05, "beta2": 0.95},
    "training": {
        "micro_batch_size": 512,
        "global_batch_size": 512,
        "train_tokens": 75e6,
        "evaluation_interval": 200,
    },
    "checkpoint": {"interval": 0},
    "logging": {"interval": 20, "tensorboard": False},
}
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
BETWEEN = [7e-4, 1.4e-3]
"""More rates for networks without norms: a first look at RATES lost them between 5e-4 and 2e-3."""

FROZEN: Tree = {"optimizer": {"temperature_rate": 0.0}}
FORMS: dict[str, Tree] = {
    "exp": {},
    "raw": {"model": {"temperature_form": "raw"}},
    "frozen": FROZEN,
    "larger-start": {"model": {"temperature_init": 1.0, "query_key_init_scale": 10.0}, **FROZEN},
    "faster-steps": {"model": {"query_key_init_scale": 0.1}, **FROZEN},
    "neither": {"model": {"temperature_init": 1.0}, **FROZEN},
}
"""Of S0. A frozen temperature of 0.01 acts like tenfold initial queries and keys (larger-start) that also learn ten
times as fast; with a tenth of the initial scale only the faster steps are left."""


def suites() -> dict[str, Tree]:
    """Return every suite by the name of its file."""
    return {
        "s0_temperature": _suite(
            "s0_temperature",
            [
                _arm(name, [1e-3, 2e-3], ARMS["SM-t"], form, {"training": {"train_tokens": 20e6}})
                for name, form in FORMS.items()
            ],
        ),
        "s1_rates": _suite("s1_rates", [_arm(name, _rates(name), tree) for name, tree in ARMS.items()]),
        "s4_depth": _suite("s4_depth", [_at_depth(depth, steps) for depth in (6, 12, 24) for steps in (50, 500)]),
    }


def _suite(name: str, arms: list[list[Tree] | Tree]) -> Tree:
    runs = [run for arm in arms for run in (arm if isinstance(arm, list) else [arm])]
    return {"name": name, "output": f"runs/regularizer/{name}", "seeds": [1], "base": BASE, "runs": runs}


def _rates(arm: str) -> list[float]:
    has_norms = "LN" in arm or arm == "TaperNorm"
    return RATES if has_norms else sorted(RATES + BETWEEN)


def _arm(name: str, rates: list[float], *trees: Tree) -> Tree:
    return {"name": name, "config": merged(*trees), "sweep": {"optimizer.learning_rate": rates}}


def _at_depth(depth: int, warmup_steps: int) -> list[Tree]:
    """Return both arms of S4 at one depth and warm-up, 384 wide."""
    size = {
        "model": {"num_layers": depth, "hidden_size": 384, "num_attention_heads": 6},
        "optimizer": {"warmup_steps": warmup_steps},
    }
    return [
        _arm(f"{name}-{depth}-layers-warmup{warmup_steps}", [1e-3, 2e-3, 4e-3], ARMS[name], size)
        for name in ("EReg", "SM-t-calibrated")
    ]


def text_of(suite: Tree) -> str:
    """Return a suite file's content."""
    return to_json(suite, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.study.regularizer", description="Write the suites of the study of the regularizer."
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("configs/suites/regularizer"),
        metavar="DIR",
        help="folder for the files (default: configs/suites/regularizer)",
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, suite in suites().items():
        write_atomically(options.output / f"{name}.json", text_of(suite))
        print(options.output / f"{name}.json")
    return 0


if __name__ == "__main__":
    run_command(main)
