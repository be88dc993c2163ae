"""Fuzz what users write: configurations, overrides, suites, points for scaling laws, files of laws and of links."""

import contextlib
import functools
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from tests.fuzz.property import TEXTS, WORDS, bytes_like, fuzz, holds, json_like
from train.config import Config, ConfigError, load_config
from train.cost.links import Links, LinksError, measured_links
from train.scaling.fits import read_fits
from train.scaling.points import PointsError, read_csv
from train.study.outcome import Outcome
from train.study.results import records
from train.study.saved import with_results
from train.study.state import State, read_state
from train.study.statistics.verdicts import judge
from train.study.suite import SuiteError, load_suite

KEYS = [
    *(
        "model.num_layers",
        "model",
        "training.train_steps",
        "training.train_tokens",
        "data.path",
        "run_dir",
        "deepspeed",
    ),
    *("deepspeed.zero_optimization", "deepspeed.zero_optimization.stage", "optimizer.learning_rate", "health", "x.y.z"),
    *("checkpoint.path", "model.architecture", "model.layers.0", "", ".", "..", "parallel.zero_stage", "seeds"),
]


@functools.cache
def sound() -> dict[str, Any]:
    tree = Config().as_dict()
    tree["training"].pop("train_tokens", None)
    return {**tree, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}


@fuzz(json_like(sound()))
def test_a_configuration(content: bytes, folder: Path) -> None:
    (folder / "c.json").write_bytes(content)
    holds(lambda: load_config(folder / "c.json"), ConfigError)


OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(TEXTS)).map("=".join),
        st.tuples(WORDS, WORDS).map("=".join),
        st.tuples(st.sampled_from(KEYS), WORDS).map("=".join),
        WORDS,
    ),
    max_size=4,
)


@fuzz(OVERRIDES)
def test_overrides(overrides: list[str], folder: Path) -> None:
    (folder / "c.json").write_text(json.dumps(sound()))
    holds(lambda: load_config(folder / "c.json", overrides), ConfigError)


SUITE = {
    "name": "table",
    "output": "runs/table",
    "seeds": [1, 2],
    "base": {"data": {"path": "nowhere"}, "training": {"train_tokens": 50e6}},
    "runs": [
        {"rows": "codeparrot-12L-T128.SM+G", "config": {"optimizer": {"learning_rate": 3e-4}}},
        {"name": "wide", "config": {"model": {"hidden_size": 1536}}, "budgets_tokens": [50e6, 100e6]},
        {"name": "swept", "sweep": {"optimizer.learning_rate": [1e-3, 2e-3]}},
        {"name": "other", "sweep": {"optimizer.learning_rate": [1e-3, 2e-3]}},
    ],
    "hypotheses": [
        {
            "name": "H1",
            "kind": "equivalent",
            "arms": ["swept", "wide"],
            "at": {"optimizer.learning_rate": 1e-3},
            "margin_nats": 0.01,
        },
        {"name": "H2", "kind": "more_stable", "arms": ["swept", "other"], "factor": 2, "claim": "It is."},
    ],
}


@fuzz(json_like(SUITE))
def test_a_suite(content: bytes, folder: Path) -> None:
    (folder / "suite.json").write_bytes(content)
    holds(lambda: load_suite(folder / "suite.json"), SuiteError)


STATE = {"step": 9, "tokens": 9, "loss": 2.5, "validation_loss": 2.5}


@fuzz(json_like(STATE))
def test_the_state_of_a_study(content: bytes, folder: Path) -> None:
    """A stage whose folder holds anything has some state, in one line."""
    (folder / "suite.json").write_text(json.dumps({**SUITE, "output": str(folder), "runs": SUITE["runs"][1:]}))
    stage = load_suite(folder / "suite.json").runs[0].stages[0]
    stage.folder.mkdir(parents=True)
    described = json.dumps({"config": stage.config.as_dict(), "dataset": {"fingerprint": "x"}}).encode()
    for name in ("metrics.jsonl", "entropy.jsonl", "failure.txt", "config.json"):
        (stage.folder / name).write_bytes(content if name != "config.json" else described)
        state = holds(lambda: read_state(stage))
        assert isinstance(state, State) and state.detail.isprintable()
    (stage.folder / "config.json").write_bytes(content)
    state = holds(lambda: read_state(stage))
    assert isinstance(state, State) and state.detail.isprintable()


RESULTS = {
    "format": "study-results",
    "version": 1,
    "suite": "table",
    "results": [
        {
            **Outcome("wide/seed1/tokens50003968", "done", 9, 2.5, [2.6, 2.4], vocab_size=400).as_row(),
            "config": {"model": {}, "regularizer": {}, "optimizer": {}, "training": {"train_steps": 9}},
            "curve": {"step": [1, 9], "loss": [3.0, None], "grad_norm": [1.0, 2.0]},
            "layers": {"step": [1], "entropy_nats": [[2.0, None]]},
            "heads": {"step": 9, "entropy_nats": [[2.0], [1.0]], "threshold": None},
            "machine": {"device": "a GPU"},
        }
    ],
}


@fuzz(json_like(RESULTS))
def test_a_file_of_results(content: bytes, folder: Path) -> None:
    """What is taken from it makes a record of each run, and a verdict."""
    (folder / "suite.json").write_text(json.dumps({**SUITE, "output": str(folder), "runs": SUITE["runs"][1:]}))
    (folder / "results.json").write_bytes(content)
    suite = load_suite(folder / "suite.json")
    saved = holds(lambda: with_results(suite, [folder / "results.json"]), SuiteError)
    for record in records(saved) if saved else ():
        assert record.state.detail.isprintable() and record.outcome.step >= 0
    judge(suite.hypotheses, records(saved or suite))


CSV = b"architecture,N,D,loss\nA,70M,1e9,3.1\nA,140M,2e9,2.9\nB,70M,1e9,3.3\nB,140M,,3.0\n"


@fuzz(bytes_like(CSV))
def test_points(content: bytes, folder: Path) -> None:
    (folder / "points.csv").write_bytes(content)
    holds(lambda: read_csv(folder / "points.csv"), PointsError)


LAW = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28}
LAWS = {
    "source": "points.csv",
    "parameters": "total",
    "architectures": {
        "A": {
            **LAW,
            "objective": 0.1,
            "points": 9,
            "loss_unit": "nats a token",
            "left_out": [],
            "range_parameters": [1e6, 1e9],
            "range_tokens": [1e8, 1e10],
            "resamples": [list(LAW.values())],
        }
    },
}


@fuzz(json_like(LAWS))
def test_a_file_of_laws(content: bytes, folder: Path) -> None:
    (folder / "laws.json").write_bytes(content)
    holds(lambda: read_fits(folder / "laws.json"), PointsError)


LINK = {
    "check": "all-reduce tensor",
    "link": {"axis": "tensor", "ranks": 2, "nodes": 1, "sizes_bytes": [1], "gb_per_s": [200.0], "latency_s": 2e-5},
}


@fuzz(json_like(LINK))
def test_a_file_of_measured_links(content: bytes, folder: Path) -> None:
    (folder / "doctor.jsonl").write_bytes(content)
    holds(lambda: measured_links(folder / "doctor.jsonl", Links(200e9, 47e9)), LinksError)


NUMBERS = st.sampled_from(["", "0", "1", "-1", "x", "9" * 400, "1e9", " 1", "²", "\x1b[31m", "2"])


@fuzz(st.dictionaries(st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"]), NUMBERS))
def test_a_launchers_environment(variables: dict[str, str], folder: Path) -> None:
    from parallel.launch import LaunchError, rank, world_size

    with mock.patch.dict(os.environ, variables), contextlib.redirect_stderr(io.StringIO()):
        holds(world_size, LaunchError)
        holds(rank, LaunchError)
