"""Write the suites of the study of the regularizer: what it buys, at which learning rates, depths and lengths.

    python -m train.study.regularizer --output configs/suites/regularizer
    python -m train.study run configs/suites/regularizer/s1_rates.json --jobs 2

    s0_temperature   what a temperature does: its form, and whether its gain of scale or of learning rate helps
    s1_rates         every arm at five to eight learning rates, one seed
    s2_seeds         five arms at their own best rates, six paired seeds
    s2_stability     which rates are stable with the regularizer and without, six paired seeds
    s3_tokens        the same two arms from 75 to 600 million tokens, three seeds
    s4_depth         two arms at 6, 12 and 24 layers, with short and long warm-up

`ARMS` defines what is compared. docs/study/regularizer holds the hypotheses, the text and the results.
"""

import argparse
from collections.abc import Sequence
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
BELOW = [3.5e-4]
"""For temperatures alone, which 7e-4 loses."""

OWN_BEST = {"EReg": 1e-3, "EReg-calibrated": 1e-3, "SM-t": 5e-4, "SM-t-calibrated": 5e-4, "SM+LN+G": 1e-3}
"""Best rates of S1, on its first seed and the first half of the validation split."""
PAIRED_SEEDS = [2, 3, 4, 5, 6, 7]
FIXED_WARMUP: Tree = {"optimizer": {"warmup_steps": 57}}
"""As long as in S1, where it is a twentieth of the run."""

BUDGETS = [75e6, 150e6, 300e6, 600e6]
PAIR = ("EReg-calibrated", "SM-t-calibrated")
"""With and without the regularizer: the arms of S2's second part, S3 and S4."""

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
        "s2_seeds": _suite(
            "s2_seeds",
            [_run(name, ARMS[name], _at(rate)) for name, rate in OWN_BEST.items()]
            + [_run("EReg-calibrated-low-rate", ARMS["EReg-calibrated"], _at(OWN_BEST["SM-t-calibrated"]))],
            seeds=PAIRED_SEEDS,
            hypotheses=[
                {
                    "name": "H1",
                    "kind": "equivalent",
                    "arms": ["EReg-calibrated-low-rate", "SM-t-calibrated"],
                    "margin_nats": 0.01,
                    "claim": "At the rate that temperatures alone stand, the regularizer changes nothing.",
                },
                _better("H3", "EReg-calibrated", "SM-t-calibrated", "Each at its own best rate, the regularizer wins."),
                _better("H5", "EReg-calibrated", "EReg", "Calibrated temperatures are better than 0.01 in each layer."),
                _better("H6", "SM+LN+G", "EReg-calibrated", "A GPT-2 of the same width and depth is still better."),
            ],
        ),
        "s2_stability": _suite(
            "s2_stability",
            [_arm(name, sorted(RATES[:3] + BETWEEN + BELOW), ARMS[name], _short()) for name in PAIR],
            seeds=PAIRED_SEEDS,
            hypotheses=[
                {
                    "name": "H2",
                    "kind": "more_stable",
                    "arms": list(PAIR),
                    "factor": 1.4,
                    "claim": "With the regularizer larger learning rates are stable.",
                }
            ],
        ),
        "s3_tokens": _suite(
            "s3_tokens",
            [{**_run(name, ARMS[name], _at(OWN_BEST[name]), FIXED_WARMUP), "budgets_tokens": BUDGETS} for name in PAIR],
            seeds=[1, 2, 3],
            hypotheses=[
                {
                    "name": "H4",
                    "kind": "gap_shrinks",
                    "arms": list(PAIR),
                    "claim": "The regularizer's advantage shrinks as tokens grow.",
                }
            ],
        ),
        "s4_depth": _suite("s4_depth", [_at_depth(depth, steps) for depth in (6, 12, 24) for steps in (50, 500)]),
    }


def _suite(name: str, arms: Sequence[list[Tree] | Tree], **more: Any) -> Tree:
    runs = [run for arm in arms for run in (arm if isinstance(arm, list) else [arm])]
    return {"name": name, "output": f"runs/regularizer/{name}", "seeds": [1], **more, "base": BASE, "runs": runs}


def _rates(arm: str) -> list[float]:
    if "LN" in arm or arm == "TaperNorm":
        return RATES
    return sorted(RATES + BETWEEN + (BELOW if arm.startswith("SM-t") else []))


def _run(name: str, *trees: Tree) -> Tree:
    return {"name": name, "config": merged(*trees)}


def _at(rate: float) -> Tree:
    return {"optimizer": {"learning_rate": rate}}


def _short() -> Tree:
    """Return the settings of runs that end soon after warm-up, which is when runs are lost."""
    return {"training": {"train_tokens": 10e6}, **FIXED_WARMUP}


def _better(name: str, first: str, second: str, claim: str) -> Tree:
    return {"name": name, "kind": "better", "arms": [first, second], "claim": claim}


def _arm(name: str, rates: list[float], *trees: Tree) -> Tree:
    return {**_run(name, *trees), "sweep": {"optimizer.learning_rate": rates}}


def _at_depth(depth: int, warmup_steps: int) -> list[Tree]:
    """Return both arms of S4 at one depth and warm-up, 384 wide."""
    size = {
        "model": {"num_layers": depth, "hidden_size": 384, "num_attention_heads": 6},
        "optimizer": {"warmup_steps": warmup_steps},
    }
    return [_arm(f"{name}-{depth}-layers-warmup{warmup_steps}", [1e-3, 2e-3, 4e-3], ARMS[name], size) for name in PAIR]


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
