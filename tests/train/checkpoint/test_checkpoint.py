"""Checkpoints: other layouts, damage, hostile files, a full disk, what is kept, and where."""

import hashlib
import json
import os
import pickle
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import padded_vocab_size
from parallel.local_ranks import run_ranks
from tests.conftest import prepare_sources
from tests.train.runs import Output, journal, main_output, rows, run_faulty, run_main, without_times

LAYOUTS: list[tuple[int, list[str]]] = [
    (2, ["parallel.tensor_parallel_size=2"]),
    (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
    (2, ["training.micro_batch_size=2", "parallel.zero_stage=3"]),
    (4, ["parallel.tensor_parallel_size=4", "parallel.sequence_parallel=true"]),
    (4, ["parallel.context_parallel_size=2", "training.micro_batch_size=2", "parallel.zero_stage=2"]),
    (1, []),
]
VOCAB_SIZE = 360


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose vocabulary is padded to more rows on several tensor-parallel ranks than on one."""
    return prepare_sources(tmp_path_factory.mktemp("dataset"), VOCAB_SIZE)


def test_layouts_changed_at_each_restart_train_one_curve(tiny_config: Path, tmp_path: Path) -> None:
    """Vocabulary padding shrinks and grows on the way: 360 tokens are 384 rows on one rank, 512 on two and on four."""
    assert [padded_vocab_size(VOCAB_SIZE, tp) for tp in (1, 2, 4)] == [384, 512, 512]
    assert run_main(1, tiny_config).statuses == [0]
    chain = f"run_dir={tmp_path}/chain"
    for number, (world_size, layout) in enumerate(LAYOUTS, start=1):
        stop = [f"training.train_steps={2 * number}"] if number < len(LAYOUTS) else []
        schedule = ["optimizer.schedule=wsd", "optimizer.decay_fraction=0", "optimizer.warmup_steps=1"]
        answer = run_main(world_size, tiny_config, chain, *layout, *stop, *schedule)
        assert answer.statuses == [0] * world_size, answer.stderr
    straight = run_main(1, tiny_config, f"run_dir={tmp_path}/straight", *schedule)
    assert straight.statuses == [0]
    found = {row["step"]: row for row in without_times(tmp_path / "chain") if "loss" in row}
    expected = {row["step"]: row for row in without_times(tmp_path / "straight") if "loss" in row}
    assert list(found) == list(range(1, 13))
    for step, row in expected.items():
        assert found[step] == pytest.approx(row, rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_stages_that_were_divided_otherwise_is_resumed(tiny_config: Path, tmp_path: Path) -> None:
    common = ["model.num_layers=4", "parallel.pipeline_parallel_size=2", "training.train_steps=8"]
    run, half = [*common, f"run_dir={tmp_path}/run"], "training.train_steps=4"
    schedule = ["optimizer.schedule=wsd", "optimizer.decay_fraction=0", "optimizer.warmup_steps=1"]
    assert run_faulty(_with_equal_stages, 2, tiny_config, [*run, half, *schedule]).statuses == [0, 0]
    assert run_main(2, tiny_config, *run, *schedule).statuses == [0, 0]
    assert run_main(2, tiny_config, *common, f"run_dir={tmp_path}/straight", *schedule).statuses == [0, 0]
    found, expected = ([row for row in without_times(tmp_path / name) if "loss" in row] for name in ("run", "straight"))
    assert len(found) == 8
    for there, here in zip(expected, found, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def _with_equal_stages(arguments: list[str]) -> Output:
    """Train with two layers on each stage, as stages were divided once; the head would make them three and one."""
    from train import parts

    parts.stage_layers = lambda *_: [range(2), range(2, 4)]  # type: ignore[assignment]
    return main_output(arguments)


def test_padding_that_grows_and_shrinks_leaves_no_trace(tiny_config: Path, tmp_path: Path) -> None:
    """The table holds the model as it is, without padding, whatever the layout that saved it."""
    assert padded_vocab_size(VOCAB_SIZE, 1) < padded_vocab_size(VOCAB_SIZE, 4)
    shapes = []
    for world_size, layout in ((1, []), (4, ["parallel.tensor_parallel_size=4"])):
        run = tmp_path / f"on{world_size}"
        answer = run_main(world_size, tiny_config, f"run_dir={run}", "training.train_steps=1", *layout)
        assert answer.statuses == [0] * world_size, answer.stderr
        table = json.loads((run / "checkpoints/step_00000001/tensors.json").read_text())
        shapes.append({name: entry["shape"] for name, entry in table.items()})
    assert shapes[0] == shapes[1] and shapes[0]["model.embedding.word.weight"] == [VOCAB_SIZE, 32]


@pytest.fixture
def two_checkpoints(tiny_config: Path, tmp_path: Path) -> Path:
    assert run_main(1, tiny_config).statuses == [0]
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["rank_00000_000.bin", "tensors.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    two_checkpoints: Path, tiny_config: Path, name: str, damage: str
) -> None:
    before = without_times(two_checkpoints)
    file = two_checkpoints / "checkpoints/step_00000012" / name
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        position = random.randrange(len(content))
        content[position] ^= 1 << random.randrange(8)
        file.write_bytes(content if damage == "flipped" else content[:position])
    answer = run_main(1, tiny_config)
    assert answer.statuses == [0], answer.stderr
    assert "resumed" in answer.stdout and "step 6" in answer.stdout
    incomplete = name == "checkpoint.json" and damage == "missing"  # what a crash leaves: nothing to complain of
    assert incomplete or (str(file) in answer.stderr and answer.stderr.count("\n") == 1), answer.stderr
    assert without_times(two_checkpoints) == before, "the curve is the same as without the damage"


def test_damage_met_by_another_rank_is_known_to_all(two_checkpoints: Path, tiny_config: Path) -> None:
    for step in (6, 12):
        for file in (two_checkpoints / f"checkpoints/step_{step:08d}").glob("rank_*.bin"):
            file.write_bytes(file.read_bytes()[:-1])
    answer = run_main(2, tiny_config, "parallel.tensor_parallel_size=2")
    assert answer.statuses == [2, 2]
    assert answer.stderr.count("error:") == 1 and "no checkpoint is intact" in answer.stderr
    assert "step_00000006/rank_00000_000.bin: has" in answer.stderr


def test_a_table_that_one_rank_cannot_read_is_known_to_all(two_checkpoints: Path) -> None:
    assert run_ranks(_newest_sound, 2, str(two_checkpoints / "checkpoints"), time_limit_s=60) == [6, 6]


def _newest_sound(root: str) -> int:
    """The step found where rank 1 once fails to read the newest table."""
    from parallel.launch import initialize_distributed
    from train.checkpoint import load as checkpoint
    from train.checkpoint.folder import DamagedFileError, Folder

    initialize_distributed()
    read, failures = checkpoint.Reader.read_metadata, iter([torch.distributed.get_rank() == 1])

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise DamagedFileError("tensors.json: cannot be read (stale file handle)")
        return read(self, *args, **kwargs)

    checkpoint.Reader.read_metadata = failing  # type: ignore[method-assign]
    saved, faults = checkpoint.newest_sound(Folder(root), checkpoint.checkpoint_group(30.0), None)
    assert saved is not None and faults == ["tensors.json: cannot be read (stale file handle)"]
    return saved.step


def test_a_store_that_does_not_list_costs_no_run(tiny_config: Path, tmp_path: Path) -> None:
    options = ["--config", str(tiny_config), "checkpoint.interval=3"]
    ((status, _, err),) = run_ranks(_without_pruning, 1, options)
    assert status == 0 and err == ""


def _without_pruning(arguments: list[str]) -> Output:
    import train.checkpoint.saver

    def failing(*_: Any) -> None:
        raise OSError("no answer")

    train.checkpoint.saver.prune = failing
    return main_output(arguments)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/egt-hostile-file-was-run",)


def test_hostile_files_run_nothing(two_checkpoints: Path, tiny_config: Path) -> None:
    """Pickles in place of every file, under hashes that fit; also under the name of torch's own pickled table."""
    sign, trace = two_checkpoints / "checkpoints/step_00000012", Path("/tmp/egt-hostile-file-was-run")
    trace.unlink(missing_ok=True)
    bomb = pickle.dumps(Bomb())
    (sign / ".metadata").write_bytes(bomb)
    for name in ("tensors.json", "rank_00000_000.bin"):
        (sign / name).write_bytes(bomb)
        resign(sign)
        answer = run_main(1, tiny_config)
        assert not trace.exists()
        assert answer.statuses == ([2] if name.startswith("rank") else [0]), answer.stderr
        assert str(sign) in answer.stderr
    (sign / "checkpoint.json").write_bytes(bomb)
    answer = run_main(1, tiny_config)
    assert not trace.exists() and "checkpoint.json: damaged" in answer.stderr


def test_a_table_that_points_outside_its_folder_is_refused(two_checkpoints: Path, tiny_config: Path) -> None:
    folder = two_checkpoints / "checkpoints/step_00000012"
    table = json.loads((folder / "tensors.json").read_text())
    next(iter(table.values()))["chunks"][0]["file"] = "../../../secret"
    (folder / "tensors.json").write_text(json.dumps(table))
    resign(folder)
    answer = run_main(1, tiny_config)
    assert answer.statuses == [0] and "no plain file name" in answer.stderr


def resign(folder: Path) -> None:
    """Makes the marker fit the files, as an attacker would."""
    from train.checkpoint.folder import Folder, read_marker, write_marker

    marker = read_marker(Folder(str(folder)))
    for name in marker["files"]:
        content = (folder / name).read_bytes()
        marker["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_marker(Folder(str(folder)), marker)


def test_the_newest_every_nth_and_the_best_are_kept(tiny_config: Path, tmp_path: Path) -> None:
    settings = [
        "checkpoint.interval=1",
        "checkpoint.keep=2",
        "checkpoint.keep_every=4",
        "training.evaluation_interval=3",
    ]
    assert run_main(1, tiny_config, *settings).statuses == [0]
    losses = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row}
    best = min((step for step in losses if step < 12), key=lambda step: losses[step])
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept == {4, 8, 11, 12} | {best}


def test_a_full_disk_is_told_and_what_was_saved_stays(tiny_config: Path, tmp_path: Path) -> None:
    """One failed save is told and tried again; the second in a row ends the run with what was complete before."""
    assert run_main(1, tiny_config, "training.train_steps=6").statuses == [0]
    run = tmp_path / "run"
    kept = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    (status, error) = run_ranks(_main_with_small_files, 1, 100_000, str(tiny_config), "checkpoint.interval=2")[0]
    assert status == 1 and "could not be saved" in error and "File too large" in error, error
    assert "complete before it are intact" in error
    assert [row["step"] for row in journal(run) if row["event"] == "save failed"] == [8, 10]
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == kept
    assert run_main(1, tiny_config).statuses == [0], "with room again the same command goes on"


def test_no_room_for_the_logs_is_one_line(tiny_config: Path, tmp_path: Path) -> None:
    options = ["logging.interval=1", "checkpoint.interval=0"]
    (status, error) = run_ranks(_main_with_small_files, 1, 5_000, str(tiny_config), *options)[0]
    assert status == 1 and error.count("\n") == 1 and "File too large; make room" in error, error
    assert run_main(1, tiny_config).statuses == [0]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(1, 13))


def _main_with_small_files(limit_bytes: int, config: str, *overrides: str) -> tuple[int, str]:
    from tests.train.runs import main_output

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    status, _, error = main_output(["--config", config, *overrides])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return status, error


def test_a_place_that_cannot_be_written_is_told_before_anything_starts(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_main(2, tiny_config, "parallel.tensor_parallel_size=2", "checkpoint.path=/proc/checkpoints")
    assert answer.statuses == [2, 2] and answer.stderr.count("\n") == 1
    assert "/proc/checkpoints: cannot be written" in answer.stderr and "choose another checkpoint.path" in answer.stderr
    (tmp_path / "file").write_text("")
    answer = run_main(2, tiny_config, "parallel.tensor_parallel_size=2", f"run_dir={tmp_path}/file/run")
    assert answer.statuses == [2, 2] and answer.stderr.count("\n") == 1 and "cannot be written" in answer.stderr


def test_any_address_of_fsspec_will_do(tiny_config: Path, tmp_path: Path) -> None:
    address = f"checkpoint.path=file://{tmp_path}/elsewhere"
    assert run_main(1, tiny_config, address, "training.train_steps=6").statuses == [0]
    answer = run_main(2, tiny_config, address, "parallel.pipeline_parallel_size=2")
    assert answer.statuses == [0, 0] and "resumed" in answer.stdout
    assert run_ranks(_through_memory, 1) == [True]


def _through_memory() -> bool:
    """Saves rows and loads columns."""
    import torch.distributed.checkpoint as dcp

    from parallel.launch import initialize_distributed
    from parallel.state.chunks import Chunk, ChunkLoadPlanner, ChunkSavePlanner
    from train.checkpoint.folder import MARKER, Folder, read_marker, verify_file
    from train.checkpoint.root import OwnedRoot
    from train.checkpoint.tensors import Reader, Writer

    initialize_distributed()
    folder, owned = Folder("memory://run/step_00000001"), OwnedRoot(Folder("memory://run"), "a")
    whole = torch.randn(6, 5)
    halves = [Chunk("w", (6, 5), (0, 0), whole[:3]), Chunk("w", (6, 5), (3, 0), whole[3:])]
    known = {"step": 1, "adam_step": 1, "data_state": {}, "config": {}, "dataset": {}}
    dcp.save(
        {},
        storage_writer=Writer(folder, 0, known, lambda: owned.begin("step_00000001")),
        planner=ChunkSavePlanner(halves),
    )
    assert MARKER in folder.names()
    for name, digest in read_marker(folder)["files"].items():
        verify_file(folder, name, digest)
    found = torch.zeros(6, 5)
    columns = [Chunk("w", (6, 5), (0, 0), found[:, :2]), Chunk("w", (6, 5), (0, 2), found[:, 2:])]
    dcp.load({}, storage_reader=Reader(folder), planner=ChunkLoadPlanner(columns))
    return torch.equal(found, whole)


def test_a_store_that_is_gone_for_a_while_costs_one_save_and_for_good_ends_the_run(
    tiny_config: Path, tmp_path: Path
) -> None:
    """Its library raises errors of its own, which are no OSError."""
    options = ["--config", str(tiny_config), "checkpoint.path=failing://run", "checkpoint.interval=2"]
    ((status, _, err),) = run_ranks(_into_failing_store, 1, options, ["step_00000004"])
    assert status == 0 and err.count("trying again at the next save") == 1, err
    events = [(row["event"], row.get("step")) for row in journal(tmp_path / "run")]
    assert ("save failed", 4) in events and ("saved", 6) in events and ("saved", 12) in events
    options.append(f"run_dir={tmp_path}/second")
    ((status, _, err),) = run_ranks(_into_failing_store, 1, options, ["step_00000004", "step_00000006"])
    assert status == 1 and "Traceback" not in err
    assert "error: failing://run/step_00000006: could not be saved (rank 0: StoreError: no connection)" in err
    assert "complete before it are intact" in err


def _into_failing_store(arguments: list[str], failing: list[str]) -> Output:
    """A run whose store knows nothing of the folders `failing`."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class StoreError(Exception):
        pass

    class Failing(MemoryFileSystem):
        protocol = "failing"

        def _open(self, path: str, *arguments: Any, **more: Any) -> Any:
            self._reach(path)
            return super()._open(path, *arguments, **more)

        def exists(self, path: str, **more: Any) -> bool:
            self._reach(path)
            return super().exists(path, **more)

        def _reach(self, path: str) -> None:
            if any(name in path for name in failing):
                raise StoreError("no connection")

    fsspec.register_implementation("failing", Failing, clobber=True)
    return main_output(arguments)


def test_a_checkpoint_of_another_model_is_named(two_checkpoints: Path, tiny_config: Path) -> None:
    config = json.loads((two_checkpoints / "config.json").read_text())
    config["config"]["model"]["num_layers"] = 3
    (two_checkpoints / "config.json").write_text(json.dumps(config))
    answer = run_main(1, tiny_config, "model.num_layers=3")
    assert answer.statuses == [2] and "written with model.num_layers = 2" in answer.stderr


def test_configuration_versions_and_commit_are_inside(two_checkpoints: Path) -> None:
    from train.checkpoint.folder import Folder, read_marker

    marker = read_marker(Folder(str(two_checkpoints / "checkpoints/step_00000012")))
    assert marker["step"] == 12 and marker["config"]["model"]["num_layers"] == 2
    builds = torch.__version__, torch.__version__.partition("+")[0]  # the packages of some builds leave "+cu130" out
    assert marker["versions"]["torch"] in builds and "git_commit" in marker
    assert marker["data_state"]["samples_consumed"] == 96 and marker["world_size"] == 1


def test_a_run_leaves_what_others_keep_beside_its_checkpoints_and_no_other_run_saves_there(
    tiny_config: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    for file in ("step_by_step_notes/plan.md", "step_list.txt", "step_00000005/data.csv", "writable"):
        (shared / file).parent.mkdir(parents=True, exist_ok=True)
        (shared / file).write_text("precious")
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    options = [f"checkpoint.path={shared}", "checkpoint.interval=2", "checkpoint.keep=1", "checkpoint.keep_best=false"]
    answer = run_main(1, tiny_config, *options, "training.train_steps=8")
    assert answer.statuses == [0] and answer.stderr.count("are left alone") == 1 and "(step_00000005)" in answer.stderr
    answer = run_main(1, tiny_config, *options, f"run_dir={tmp_path}/second")
    assert answer.statuses == [2] and answer.stderr.count("\n") == 1 and "holds checkpoints of run" in answer.stderr
    (shared / "step_00000010").write_text("precious")
    answer = run_main(2, tiny_config, *options, "parallel.tensor_parallel_size=2")
    assert answer.statuses == [2, 2] and answer.stderr.count("\n") == 1, answer.stderr
    assert "step_00000010: is there already, and this run has not written it" in answer.stderr
    (shared / "step_00000010").unlink()
    answer = run_main(1, tiny_config, *options)
    assert answer.statuses == [0] and "at step 8" in answer.stdout, answer.stderr
    assert before.items() <= {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}.items()
    assert [path.name for path in sorted(shared.glob("step_*"))] == [
        "step_00000005", "step_00000012", "step_by_step_notes", "step_list.txt",
    ]  # fmt: skip
    run_id = json.loads((tmp_path / "run/config.json").read_text())["run_id"]
    for file in (tmp_path / "run", shared, shared / "step_00000012"):
        assert json.loads((file / "run.json").read_text())["run_id"] == run_id
    assert json.loads((shared / "step_00000012/checkpoint.json").read_text())["checkpoint"]["run_id"] == run_id
