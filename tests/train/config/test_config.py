"""Reading a configuration: precedence, types, and every fault at once with its key, value and remedy."""

import json
import re
from pathlib import Path
from typing import Any

import deepspeed.runtime.config as deepspeed_config
import pytest

from tests.train.runs import rows, run_main
from train.config import DERIVED_DEEPSPEED_KEYS, Config, ConfigError, config_from_dict, load_config, world_faults
from train.config.config import PASSED_DEEPSPEED_KEYS, PASSED_ZERO_KEYS

MINIMAL: dict[str, Any] = {"training": {"train_steps": 10}}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def faults_of(folder: Path, tree: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, tree), list(overrides))
    assert all("\n" not in fault for fault in caught.value.faults), "a fault is one line"
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def fault_of(folder: Path, tree: Any, *overrides: str) -> str:
    faults = faults_of(folder, tree, *overrides)
    assert len(faults) == 1, faults
    return faults[0]


def load(folder: Path, *overrides: str, **sections: Any) -> Config:
    return load_config(write(folder, {**MINIMAL, **sections}), list(overrides))


def test_precedence_is_default_then_file_then_command_line(tmp_path: Path) -> None:
    model = {"num_layers": 3, "hidden_size": 48}
    config = load(tmp_path, "model.num_layers=5", model=model)
    assert config.model.num_layers == 5, "command line over file"
    assert config.model.hidden_size == 48, "file over default"
    assert config.model.num_attention_heads == 12, "default"


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "model.num_layers=5", "model.num_layers=6").model.num_layers == 6


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("model.num_layers=7", "model", "num_layers", 7),
        ("optimizer.learning_rate=3e-4", "optimizer", "learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("training.global_batch_size=1e3", "training", "global_batch_size", 1000),
        ("logging.tensorboard=false", "logging", "tensorboard", False),
        ("model.final_norm=true", "model", "final_norm", True),
        ("model.fused_ffn=null", "model", "fused_ffn", True),
        ("data.planned_vocab_size=null", "data", "planned_vocab_size", None),
        ("data.path=some/where", "data", "path", "some/where"),
        ('data.path="quoted name"', "data", "path", "quoted name"),
        ("data.path=a=b", "data", "path", "a=b"),
        pytest.param("data.path=" + "[" * 4000, "data", "path", "[" * 4000, id="brackets"),
        ("model.architecture=SM+LN+G", "model", "architecture", "SM+LN+G"),
        ("parallel.zero_stage=2", "parallel", "zero_stage", 2),
    ],
)
def test_override_types(tmp_path: Path, override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load(tmp_path, override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_override_of_top_level_and_nested_deepspeed_keys(tmp_path: Path) -> None:
    config = load(tmp_path, "run_dir=runs/elsewhere", "deepspeed.zero_optimization.overlap_comm=true")
    assert config.run_dir == "runs/elsewhere"
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_run_length_on_the_command_line_replaces_the_files_in_either_unit(tmp_path: Path) -> None:
    config = load(tmp_path, "training.train_tokens=1000")
    assert (config.training.train_steps, config.training.train_tokens) == (None, 1000)
    other = load(tmp_path, "training.train_steps=3", training={"train_tokens": 10**9})
    assert (other.training.train_steps, other.training.train_tokens) == (3, None)


def test_tokens_round_up_to_whole_steps(tmp_path: Path) -> None:
    sizes = dict(model={"seq_length": 10}, training={"global_batch_size": 8, "train_tokens": 161})
    assert load(tmp_path, **sizes).train_steps == 3
    assert load(tmp_path, "training.train_tokens=160", **sizes).train_steps == 2


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("model.num_layer=3", "model.num_layer is no known key; did you mean model.num_layers?"),
        ("trainning.train_steps=3", "trainning is no known key; did you mean training?"),
        ("optimizer.learning_rte=1", "optimizer.learning_rte is no known key; did you mean optimizer.learning_rate?"),
        ("run_dirr=x", "run_dirr is no known key; did you mean run_dir?"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path: Path, override: str, wanted: str) -> None:
    assert fault_of(tmp_path, MINIMAL, override) == wanted


def test_unknown_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"checkpoint\.zzz is no known key; known keys: interval, path, init_from, keep, keep_every, keep_best",
        fault_of(tmp_path, MINIMAL, "checkpoint.zzz=1"),
    )


def test_unknown_keys_in_the_file_are_faults_too(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, {**MINIMAL, "modle": {}, "logging": {"intervall": 2}})
    assert faults == [
        "modle is no known key; did you mean model?",
        "logging.intervall is no known key; did you mean logging.interval?",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers=3.5", "a whole number"),
        ("model.num_layers=three", "a whole number"),
        ("model.num_layers=true", "a whole number"),
        ("model.num_layers=null", "a whole number"),
        ("optimizer.learning_rate=fast", "a number"),
        ("optimizer.learning_rate=NaN", "a number"),
        ("optimizer.learning_rate=Infinity", "a number"),
        ("optimizer.learning_rate=true", "a number"),
        ("optimizer.learning_rate=1" + 400 * "0", "a number"),
        ("logging.tensorboard=1", "true or false"),
        ("data.path=7", "a string"),
        ("data.planned_vocab_size=many", "a whole number or null"),
        ("parallel.zero_stage=0", "one of 1, 2, 3"),
        ("parallel.zero_stage=true", "one of 1, 2, 3"),
        ("training.precision=fp8", 'one of "auto", "bf16", "fp32"'),
        ("model.temperature=yes", 'one of "none", "per_head", "per_position" or null'),
        ("deepspeed=3", "an object"),
        ("model=3", "a section (a JSON object)"),
    ],
)
def test_wrong_type_names_key_value_and_expectation(tmp_path: Path, override: str, expected: str) -> None:
    key = override.partition("=")[0]
    assert re.fullmatch(rf"{re.escape(key)} = .+ must be {re.escape(expected)}", fault_of(tmp_path, MINIMAL, override))


@pytest.mark.parametrize("override", ["model.num_layers", "=3", "no-equals-sign"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    assert fault_of(tmp_path, MINIMAL, override) == f"{override!r} is not of the form section.key=value"


def test_override_below_a_value(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, {**MINIMAL, "run_dir": "x"}, "run_dir.name=3")
    assert faults == ["'run_dir.name=3': 'run_dir' is a value, not a section"]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("model.architecture=GPT", r"model\.architecture = 'GPT' is unknown; choose one of: SM\+LN\+G, .*"),
        ("model.num_layers=0", r"model\.num_layers = 0 must be at least 1 and at most 10,000"),
        ("model.num_layers=100000", r"model\.num_layers = 100000 must be at least 1 and at most 10,000"),
        ("model.hidden_size=1e12", r"model\.hidden_size = 1000000000000 must be at least 1 and at most 1,000,000"),
        ("data.planned_vocab_size=1e15", r"data\.planned_vocab_size = 10+ must be .* at most 1,000,000,000 .*"),
        ("model.num_attention_heads=7", r"model\.hidden_size = 768 is not a multiple of .*num_attention_heads = 7.*"),
        ("model.ffn_hidden_size=-4", r"model\.ffn_hidden_size = -4 must be at least 1.*"),
        ("model.activation=gelu", r"model\.fused_ffn = true needs model\.activation = 'identity', not 'gelu'.*"),
        ("model.temperature_init=0", r"model\.temperature_init = 0\.0 must be positive.*"),
        ("model.threshold_init=7", r"model\.threshold_init = 7\.0 must lie in \[0, 1\]: it is a fraction of ln T.*"),
        ("model.threshold_init=-0.1", r"model\.threshold_init = -0\.1 must lie in \[0, 1\].*"),
        ("model.init_std=-1", r"model\.init_std = -1\.0 must be positive"),
        ("regularizer.coefficient=-1", r"regularizer\.coefficient = -1\.0 must not be negative; 0 turns .* off"),
        ("regularizer.margin=1", r"regularizer\.margin = 1\.0 must lie in \[0, 1\).*"),
        (
            "data.planned_vocab_size=0",
            r"data\.planned_vocab_size = 0 must be at least 1 and at most .* \(tokens\), or null",
        ),
        ("optimizer.learning_rate=0", r"optimizer\.learning_rate = 0\.0 must be positive"),
        ("optimizer.min_learning_rate=1", r"optimizer\.min_learning_rate = 1\.0 must lie between 0 and .*0\.001"),
        ("optimizer.warmup_fraction=5", r"optimizer\.warmup_fraction = 5\.0 must lie in \[0, 1\].*"),
        ("optimizer.warmup_steps=-1", r"optimizer\.warmup_steps = -1 must not be negative"),
        ("optimizer.beta2=1", r"optimizer\.beta2 = 1\.0 must lie in \[0, 1\)"),
        ("optimizer.epsilon=0", r"optimizer\.epsilon = 0\.0 must be positive"),
        ("optimizer.gradient_clipping=-1", r"optimizer\.gradient_clipping = -1\.0 must not be negative"),
        ("optimizer.threshold_rate=-1", r"optimizer\.threshold_rate = -1\.0 must not be negative"),
        ("training.micro_batch_size=0", r"training\.micro_batch_size = 0 must be at least 1 \(sequences\)"),
        ("training.train_steps=0", r"training\.train_steps = 0 must be at least 1"),
        ("downstream.interval=5", r"downstream\.interval = 5 measures nothing; name files in downstream\.tasks"),
        ("training.seed=-1", r"training\.seed = -1 must not be negative"),
        ("training.evaluation_interval=-1", r"training\.evaluation_interval = -1 must not be negative; 0 .*"),
        ("checkpoint.interval=-1", r"checkpoint\.interval = -1 must not be negative; 0 saves only at the end"),
        ("checkpoint.keep=0", r"checkpoint\.keep = 0 must be at least 1"),
        ("checkpoint.keep_every=-1", r"checkpoint\.keep_every = -1 must not be negative; 0 keeps none for good"),
        ("checkpoint.path=", r"checkpoint\.path is empty; name a folder or an fsspec address.*"),
        ("health.spike_factor=-1", r"health\.spike_factor = -1\.0 must not be negative; 0 turns it off"),
        (
            "health.skip_limit=21",
            r"health\.skip_limit = 21 must be at most 20: it counts refused steps among the last 20",
        ),
        ("health.skip_limit=0", r"health\.skip_limit = 0 must be at least 1 \(steps\)"),
        ("health.step_limit_s=0", r"health\.step_limit_s = 0\.0 must be positive and at most 100,000,000 \(seconds\)"),
        ("health.rollback_limit=-1", r"health\.rollback_limit = -1 must not be negative; 0 stops at once"),
        ("logging.interval=0", r"logging\.interval = 0 must be at least 1 \(steps\)"),
        ("logging.image_interval=-1", r"logging\.image_interval = -1 must not be negative; 0 .*"),
        ("run_dir=", r"run_dir is empty; name the folder.*"),
        ("parallel.tensor_parallel_size=0", r"parallel\.tensor_parallel_size = 0 must be at least 1"),
        ("parallel.tensor_parallel_size=8", r"model\.num_attention_heads = 12 is not a multiple of .*size = 8.*"),
        ("parallel.pipeline_parallel_size=13", r".*pipeline_parallel_size = 13 exceeds model\.num_layers = 12;.*"),
        (
            "optimizer.taper_end=0.1",
            r"optimizer\.taper_start = 0\.1 must lie in .* below .*taper_end = 0\.1.*",
        ),
        ("regularizer.margin=[0.1]", r"regularizer\.margin has 1 numbers, and model\.num_layers = 12: give one .*each"),
        ("regularizer.margin=[0.1,true]", r"regularizer\.margin = .* must be a number or a list of numbers"),
        ("parallel.sequence_parallel=true", r"parallel\.sequence_parallel = true needs .*tensor_parallel_size > 1.*"),
    ],
)
def test_impossible_value_names_key_value_and_remedy(tmp_path: Path, override: str, wanted: str) -> None:
    assert re.fullmatch(wanted, fault_of(tmp_path, MINIMAL, override))


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["parallel.zero_stage=2", "parallel.pipeline_parallel_size=2"],
            "zero_stage = 2 needs .*pipeline.* = 1, not 2",
        ),
        (
            ["parallel.zero_stage=3", "model.architecture=SM+SN"],
            "zero_stage = 3 cannot be combined with .*spectral_norm",
        ),
        (["model.weight_norm=QK", "model.spectral_norm=FFN"], "weight_norm and model.spectral_norm are both set"),
        (["model.spectral_gain=true"], "spectral_gain = true needs model.spectral_norm"),
        (["regularizer.target=causal", "regularizer.granularity=per_head"], "target = 'causal' needs .*'per_query'"),
        (["model.temperature_init=calibrated", "model.spectral_norm=FFN"], "'calibrated' has no closed form with"),
        (["model.positions=rotary", "model.hidden_size=36"], "rotary' needs an even head width, not 3"),
        (
            ["parallel.sequence_parallel=true", "parallel.tensor_parallel_size=3"],
            "model.seq_length = 128 is not a multiple of .* = 3",
        ),
        (
            ["parallel.tensor_parallel_size=4", "model.architecture=SM", "model.ffn_hidden_size=1026"],
            "model.ffn_hidden_size = 1026 is not a multiple of .* = 4",
        ),
    ],
)
def test_combinations_that_cannot_be(tmp_path: Path, overrides: list[str], wanted: str) -> None:
    assert re.search(wanted, fault_of(tmp_path, MINIMAL, *overrides))


@pytest.mark.parametrize("training", [{}, {"train_steps": 5, "train_tokens": 1000}])
def test_a_run_has_exactly_one_length(tmp_path: Path, training: dict[str, int]) -> None:
    assert "set exactly one of them" in fault_of(tmp_path, {"training": training})


def test_a_margin_for_each_layer(tmp_path: Path) -> None:
    config = load(tmp_path, "regularizer.margin=[0, 0.25]", model={"num_layers": 2})
    assert config.regularizer.margin == [0.0, 0.25]
    assert config_from_dict(config.as_dict()) == config


def test_all_faults_at_once(tmp_path: Path) -> None:
    tree = {
        "modell": {},
        "model": {"num_layers": "many", "hidden_size": 100, "num_attention_heads": 7},
        "optimizer": {"learning_rate": -1, "betta1": 0.5},
        "training": {"micro_batch_size": 0, "train_steps": 1},
        "deepspeed": {"fp16": {"enabled": True}},
    }
    faults = faults_of(tmp_path, tree, "logging.interval=0", "nonsense")
    for part in (
        "modell is no known key",
        'model.num_layers = "many"',
        "model.hidden_size = 100",
        "optimizer.learning_rate = -1",
        "optimizer.betta1 is no known key; did you mean optimizer.beta1?",
        "training.micro_batch_size = 0",
        "deepspeed.fp16",
        "logging.interval = 0",
        "'nonsense'",
    ):
        assert sum(part in fault for fault in faults) == 1, (part, faults)
    assert len(faults) == 9


@pytest.mark.parametrize("key", DERIVED_DEEPSPEED_KEYS)
def test_derived_deepspeed_keys_are_refused(tmp_path: Path, key: str) -> None:
    tree: Any = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    fault = fault_of(tmp_path, {**MINIMAL, "deepspeed": tree})
    assert fault.startswith(f"deepspeed.{key} = 1 is derived from {DERIVED_DEEPSPEED_KEYS[key]}; remove it")


def test_zero_values_of_derived_keys_are_refused_too(tmp_path: Path) -> None:
    tree = {**MINIMAL, "deepspeed": {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}}
    assert len(faults_of(tmp_path, tree)) == 2


def test_other_deepspeed_keys_pass_through(tmp_path: Path) -> None:
    own = {"memory_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}
    assert load(tmp_path, deepspeed=own).deepspeed == own


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", r"line 1, column 1: not JSON"),
        ('{"model": {"num_layers": 2},}', r"line 1, column \d+: not JSON"),
        ('{\n  "model": {\n    num_layers: 2}}', r"line 3, column 5: not JSON"),
        ("[1, 2]", r"expected a JSON object with sections, found list"),
        pytest.param("[" * 100_000, r"brackets within brackets", id="brackets"),
        pytest.param('{"run_dir": ' + "9" * 5000, "has 5000 digits", id="digits"),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, text: str, wanted: str) -> None:
    fault = fault_of(tmp_path, text)
    assert fault.startswith(str(tmp_path / "run.json"))
    assert re.search(wanted, fault)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"run_dir": "\xe9"}')
    for path, wanted in (
        (tmp_path / "absent.json", "no such configuration file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.json", "byte 13 is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=wanted) as caught:
            load_config(path)
        assert len(caught.value.faults) == 1 and str(path) in caught.value.faults[0]


def test_a_dictionary_makes_the_round_trip(tmp_path: Path) -> None:
    config = load(
        tmp_path, "model.architecture=SM+LN+G", "data.planned_vocab_size=77", deepspeed={"steps_per_print": 5}
    )
    assert config_from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert config.model.ffn_hidden_size == 4 * 768 and config.model.activation == "gelu", "resolved"


def test_a_dictionary_has_the_same_checks() -> None:
    with pytest.raises(ConfigError, match="did you mean training"):
        config_from_dict({"trainin": {}})


@pytest.mark.parametrize("world", [1, 2, 4, 6, 12])
def test_worlds_that_fit(tmp_path: Path, world: int) -> None:
    tp = {1: 1, 2: 2, 4: 2, 6: 3, 12: 3}[world]
    config = load(
        tmp_path, parallel={"tensor_parallel_size": tp}, training={"train_steps": 1, "global_batch_size": 24,
        "micro_batch_size": 3},
    )  # fmt: skip
    assert world_faults(config, world) == []
    assert config.data_parallel_size(world) == world // tp
    assert config.num_micro_batches(world) * 3 * (world // tp) == 24


def test_world_that_the_sizes_do_not_multiply_to(tmp_path: Path) -> None:
    config = load(tmp_path, parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 3})
    (fault,) = world_faults(config, 8)
    assert "world size 8" in fault and "(2)" in fault and "(3) = 6" in fault and "multiple of 6" in fault


def test_batch_that_the_replicas_do_not_divide(tmp_path: Path) -> None:
    config = load(tmp_path, training={"train_steps": 1, "micro_batch_size": 4, "global_batch_size": 10})
    (fault,) = world_faults(config, 2)
    assert "global_batch_size = 10" in fault and "(4)" in fault and "(2) = 8" in fault


@pytest.mark.parametrize("world", [0, -1])
def test_world_without_processes(tmp_path: Path, world: int) -> None:
    assert world_faults(load(tmp_path), world) == [f"the world size {world} must be at least 1"]


def test_every_key_is_explained() -> None:
    import dataclasses
    import typing

    types = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        keys = dataclasses.fields(types[section.name]) if dataclasses.is_dataclass(types[section.name]) else [section]
        for key in keys:
            assert len(key.metadata["help"]) > 20, f"{section.name}.{key.name}"


def test_a_key_given_twice_is_not_decided_by_its_place(tmp_path: Path) -> None:
    text = '{"model": {"num_layers": 2, "num_layers": 3}, "training": {"train_steps": 1}}'
    assert fault_of(tmp_path, text).endswith("run.json: num_layers is given twice in one section; keep one")


def test_zero_optimization_is_a_section(tmp_path: Path) -> None:
    tree = {**MINIMAL, "deepspeed": {"zero_optimization": 2}}
    assert fault_of(tmp_path, tree) == "deepspeed.zero_optimization = 2 must be a section (a JSON object)"


@pytest.mark.parametrize(
    "key",
    ["wandb", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "elasticity", "amp", "a\x1b"],
)
def test_a_feature_of_deepspeed_that_is_not_supported_is_refused_at_once(tmp_path: Path, key: str) -> None:
    fault = fault_of(tmp_path, MINIMAL, f'deepspeed.{key}={{"enabled": true}}')
    assert fault.startswith(f"deepspeed.{key} is not passed on to DeepSpeed; ".replace("\x1b", "\\x1b"))


def test_what_is_passed_on_is_known_to_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(PASSED_ZERO_KEYS) <= fields.keys() | {field.alias for field in fields.values()}
    source = "".join(path.read_text() for path in Path(deepspeed_config.__file__).parents[1].rglob("*.py"))
    assert [key for key in PASSED_DEEPSPEED_KEYS if f'"{key}"' not in source] == []


BUCKETS = {"allgather_bucket_size": 2000, "allgather_partitions": False, "contiguous_gradients": False,
           "overlap_comm": True, "reduce_bucket_size": 3000, "reduce_scatter": False}  # fmt: skip
STAGE_3 = {"overlap_comm": True, "contiguous_gradients": False, "reduce_bucket_size": 3000, "sub_group_size": 2000,
           "stage3_gather_16bit_weights_on_model_save": True, "stage3_max_live_parameters": 1000,
           "stage3_max_reuse_distance": 1000, "stage3_model_persistence_threshold": 1000,
           "stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 1000}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        ("parallel.zero_stage=1", BUCKETS),
        ("parallel.zero_stage=2", BUCKETS),
        ("parallel.zero_stage=3", STAGE_3),
        ("parallel.pipeline_parallel_size=2", BUCKETS),
    ],
)
def test_what_is_passed_on_to_zero_changes_no_loss(
    tiny_config: Path, tmp_path: Path, layout: str, zero: dict[str, Any]
) -> None:
    assert {*BUCKETS, *STAGE_3} == set(PASSED_ZERO_KEYS)
    for name, own in (("default", []), ("own", [f"deepspeed.zero_optimization={json.dumps(zero)}"])):
        answer = run_main(2, tiny_config, layout, *own, "training.train_steps=3", f"run_dir={tmp_path / name}")
        assert answer.statuses == [0, 0], answer.stderr
    default, own = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("default", "own"))
    assert len(own) == 3 and own == default


def test_what_deepspeed_does_not_take_is_one_line_and_the_run_can_start_after(tiny_config: Path) -> None:
    answer = run_main(2, tiny_config, "deepspeed.comms_loger.enabled=true")
    assert answer.statuses == [2, 2]
    (line,) = answer.stderr.splitlines()
    assert line == "error: deepspeed.comms_loger is not passed on to DeepSpeed; did you mean comms_logger?"
    answer = run_main(1, tiny_config, "deepspeed.zero_optimization.reduce_bucket_size=-5")
    assert answer.statuses == [2]
    (line,) = answer.stderr.splitlines()
    assert "reduce_bucket_size = -5 of DeepSpeedZeroConfig" in line and "greater than 0" in line
    for setting, wanted in (
        ("steps_per_print=often", 'deepspeed.steps_per_print = "often" must be a whole number from 1, or null'),
        ("dump_state=often", 'deepspeed.dump_state = "often" must be true or false'),
    ):
        answer = run_main(1, tiny_config, f"deepspeed.{setting}")
        assert answer.statuses == [2] and wanted in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
    known = [
        "deepspeed.comms_logger.enabled=true",
        "deepspeed.memory_breakdown=true",
        "deepspeed.dump_state=true",
    ]
    known += ["deepspeed.steps_per_print=null"]
    known += ["deepspeed.zero_optimization.reduce_bucket_size=1000"]
    answer = run_main(2, tiny_config, *known, "parallel.pipeline_parallel_size=2", "training.train_steps=2")
    assert answer.statuses == [0, 0], answer.stderr
