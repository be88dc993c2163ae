"""Ranks that do not run the same thing end at start, all with status 2 and one message."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed import PrefixStore, TCPStore

from parallel.launch import free_port
from parallel.local_ranks import run_ranks
from tests.train.runs import Answer, Output, main_output, run_faulty
from train.config import Config
from train.start.differences import Side, describe_differences, name_ranks
from train.start.facts import config_facts, environment_facts, source_facts
from train.start.same_start import digest, exchange

ROOT = Path(__file__).parents[3]

OVERRIDES = {  # on rank 1: the key, its value, and that of rank 0 in the message
    "learning rate": ("optimizer.learning_rate", "0.5", "0.001"),
    "train steps": ("training.train_steps", "13", "12"),
    "tensor parallel": ("parallel.tensor_parallel_size", "2", "1"),
    "refused size": ("parallel.tensor_parallel_size", "4", "1"),
    "seed": ("training.seed", "7", "1"),
    "weight decay": ("optimizer.weight_decay", "0.7", "0.1"),
    "global batch": ("training.global_batch_size", "16", "8"),
    "zero stage": ("parallel.zero_stage", "2", "1"),
    "layers": ("model.num_layers", "3", "2"),
    "precision": ("training.precision", '"bf16"', '"auto"'),
}
QUICK = ("learning rate", "refused size")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OVERRIDES]
)
def test_an_override_on_one_rank_ends_all(tiny_config: Path, name: str) -> None:
    key, there, here = OVERRIDES[name]
    answer = run_faulty(override_on_rank_one, 2, tiny_config, [], [f"{key}={there}"])
    check_refused(answer, f"{key} is {here} on rank 0; {there} on rank 1")


@pytest.mark.parametrize("kind", ["dataset", "source", "version", "variable"])
def test_anything_else_on_one_rank_ends_all(tiny_config: Path, another_dataset: Path, kind: str) -> None:
    expected = {
        "dataset": "dataset fingerprint is ",
        "source": "source train/extra.py is absent on rank 0; 0123 on rank 1",
        "version": "version triton is 3.6.0 on rank 0; 9.9.9 on rank 1",
        "variable": "variable NVIDIA_TF32_OVERRIDE is unset on rank 0; 0 on rank 1",
    }[kind]
    check_refused(run_faulty(another_on_rank_one, 2, tiny_config, [], kind, str(another_dataset)), expected)


def test_a_rank_without_the_dataset_lets_the_others_know(tiny_config: Path) -> None:
    answer = run_faulty(override_on_rank_one, 2, tiny_config, [], ["data.path=/nowhere/at/all"])
    check_refused(answer, "rank 1 cannot start: /nowhere/at/all")


def test_a_missing_configuration_on_one_rank_ends_all(tiny_config: Path) -> None:
    answer = run_faulty(override_on_rank_one, 2, tiny_config, [], ["training.sead=1"])
    check_refused(answer, "rank 1 cannot start: training.sead")


def test_the_same_fault_everywhere_is_reported_as_of_one(tiny_config: Path) -> None:
    answer = run_faulty(main_output, 2, tiny_config, ["parallel.tensor_parallel_size=4"])
    assert answer.statuses == [2, 2] and "rank 1" not in answer.stderr
    assert answer.stderr.count("is not a multiple of tensor_parallel_size(4)") == 1


def test_rank_zero_leaves_last_where_all_refuse() -> None:
    port, side = free_port(), Side([0], {}, "no such file")
    stores = [TCPStore("127.0.0.1", port, 2, is_master=first, wait_for_workers=False) for first in (True, False)]
    other = PrefixStore("same_start", stores[1])
    with ThreadPoolExecutor(1) as pool:
        rank_zero = pool.submit(exchange, stores[0], side, 2, 60.0)
        other.set("digest/1", digest(side))
        assert other.get("asked") == b"[]"
        with pytest.raises(TimeoutError):
            rank_zero.result(timeout=0.5)
        other.set("read/1", "")
        assert rank_zero.result() == []


def test_places_may_differ(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_faulty(
        override_on_rank_one, 2, tiny_config, ["training.train_steps=1"], [f"data.cache_dir={tmp_path}"]
    )
    assert answer.statuses == [0, 0], answer.stderr


def test_a_rank_that_does_not_arrive_is_named(tiny_config: Path) -> None:
    answer = run_faulty(two_of_three, 2, tiny_config, ["health.start_limit_s=3", "training.global_batch_size=12"])
    assert answer.statuses == [4] * 2
    assert answer.stderr.count("rank 2 of 3 did not arrive within 3 seconds") == 1, answer.stderr


def test_what_an_earlier_start_left_in_a_launchers_store_misleads_nobody() -> None:
    """torchrun's agent keeps its store for the ranks that it restarts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    starts = run_ranks(started_again, 2, store.port)
    assert starts[0] == starts[1]
    late, alike, different, again = starts[0]
    assert late.startswith("rank 2 of 3 did not arrive") and alike == again == "starts"
    assert "optimizer.learning_rate is 1 on rank 0; 2 on rank 1" in different


def started_again(port: int) -> list[str]:
    """The outcomes of four starts at one store; in each, another rank comes first."""
    from train.start.same_start import DifferenceError, LateError, compare_ranks

    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(port))
    here, told = int(os.environ["RANK"]), []
    for turn, (size, rate) in enumerate([("3", "1"), ("2", "1"), ("2", "2"), ("2", "1")]):
        time.sleep(1.0 if turn % 2 == here else 0.0)
        os.environ["WORLD_SIZE"] = size
        try:
            compare_ranks({"optimizer.learning_rate": rate if here else "1"}, None, 3.0)
            told.append("starts")
        except (DifferenceError, LateError) as error:
            told.append(str(error))
    return told


WRAPPER = """
import os, sys
from pathlib import Path
from train.main import main
rank = os.environ["RANK"]
status = main([*sys.argv[2:], *(["training.seed=7"] if rank == os.environ.get("ODD_RANK") else [])])
Path(sys.argv[1], f"status_{rank}").write_text(str(status))
os._exit(status)
"""


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("variables", marks=pytest.mark.slow)])
@pytest.mark.parametrize("odd_rank", ["0", pytest.param("none", marks=pytest.mark.slow)])
def test_under_a_launcher(tiny_config: Path, tmp_path: Path, launcher: str, odd_rank: str) -> None:
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    command = [sys.executable, str(tmp_path / "wrapper.py"), str(tmp_path), "--config", str(tiny_config)]
    command.append("training.train_steps=1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ODD_RANK": odd_rank}
    if launcher == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        places: list[dict[str, str]] = [{}]
    else:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, env={**environment, **place}, stderr=pipe, text=True, cwd=tmp_path)
        for place in places
    ]
    stderr = "".join(process.communicate(timeout=240)[1] for process in started)
    statuses = [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)]
    if odd_rank == "none":
        assert statuses == ["0", "0"], stderr
    else:
        assert statuses == ["2", "2"], stderr
        assert stderr.count("error: training.seed is 7 on rank 0; 1 on rank 1") == 1 and "error: rank 1" not in stderr


def test_every_key_of_the_configuration_is_compared() -> None:
    facts = config_facts(Config())
    assert facts["optimizer.beta1"] == "0.9"
    tree = Config().as_dict()
    sections = {name: keys for name, keys in tree.items() if isinstance(keys, dict)}
    expected = {f"{name}.{key}" for name, keys in sections.items() for key in keys} | {"run_dir", "deepspeed"}
    assert expected - set(facts) == {"data.path", "data.cache_dir", "data.cache_gigabytes"}


def test_every_source_file_is_compared(tmp_path: Path) -> None:
    for package in ("model", "parallel", "data", "train"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    before = source_facts(tmp_path)
    assert len(before) == 4
    (tmp_path / "data" / "a.py").write_text("x = 2\n")
    after = source_facts(tmp_path)
    assert [key for key in before if before[key] != after[key]] == ["source data/a.py"]


def test_the_environment_of_a_cpu_is_known() -> None:
    import torch

    facts = environment_facts()
    assert facts["version torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["accelerator"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_ranks_that_share_a_value_are_named_together() -> None:
    a, b, c = {"x.y": "1", "x.z": "5"}, {"x.y": "2", "x.z": "5"}, {"x.y": "2", "x.z": "6"}
    lines = describe_differences([Side([0, 4], a), Side([1, 2], b), Side([3], c)])
    assert "x.y is 1 on ranks 0, 4; 2 on ranks 1-3" in lines
    assert "x.z is 5 on ranks 0-2, 4; 6 on rank 3" in lines
    assert "same command" in lines[-1]


def test_keys_beyond_the_first_are_counted() -> None:
    lines = describe_differences([Side([0], {f"a.{n}": "1" for n in range(19)}), Side([1], {})])
    assert sum("absent on rank 1" in line for line in lines) == 12 and "and 7 more keys differ" in lines


def test_commits_are_named_where_the_sources_differ() -> None:
    lines = describe_differences(
        [Side([0], {"source a.py": "1"}, "", "abc"), Side([1], {"source a.py": "2"}, "", "def-dirty")]
    )
    assert "commit is abc on rank 0; def-dirty on rank 1" in lines


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([1, 2], "ranks 1-2"),
        ([5, 0, 1], "ranks 0-1, 5"),
        (range(0, 20, 2), "ranks 0, 2, 4, 6, 8, 10 and 4 more"),
    ],
)
def test_ranks_are_named_as_ranges(ranks: Any, words: str) -> None:
    assert name_ranks(ranks) == words


def check_refused(answer: Answer, expected: str) -> None:
    assert answer.statuses == [2, 2], answer.stderr
    assert answer.stderr.count(expected) == 1 and "Traceback" not in answer.stderr, answer.stderr


@pytest.fixture(scope="session")
def another_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other text than `dataset`, with the same number of tokens in its vocabulary."""
    from data.prepare import main

    folder = tmp_path_factory.mktemp("another")
    main(["--input", str(ROOT / "data"), "--output", str(folder), "--vocab-size", "400"])
    return folder


def override_on_rank_one(arguments: list[str], extra: list[str]) -> Output:
    return main_output([*arguments, *extra] if os.environ["RANK"] == "1" else arguments)


def two_of_three(arguments: list[str]) -> Output:
    with mock.patch.dict(os.environ, WORLD_SIZE="3"):
        return main_output(arguments)


def another_on_rank_one(arguments: list[str], kind: str, dataset: str) -> Output:
    import train.start.facts
    import train.start.same_start

    is_odd = os.environ["RANK"] == "1"
    if kind == "dataset" and is_odd:  # a copy of its own in the same place, as far as the others can tell
        arguments = [*arguments, f"data.path={dataset}"]
    if kind == "source" and is_odd:
        found = source_facts() | {"source train/extra.py": "0123"}
        train.start.same_start.source_facts = lambda: found  # type: ignore[assignment]
    if kind == "version":
        number, real = "9.9.9" if is_odd else "3.6.0", train.start.facts._version
        train.start.facts._version = lambda name: number if name == "triton" else real(name)  # type: ignore[assignment]
    if kind == "variable" and is_odd:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    return main_output(arguments)
