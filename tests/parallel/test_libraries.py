"""Test that each library's private names are in one file, and that an installed version without them is refused."""

import ast
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from parallel import deepspeed_internals
from parallel.libraries import SUPPORTED, LibraryChangedError, replace, require, require_arguments, require_assigned

ROOT = Path(__file__).parents[2]
PUBLIC = {  # of DeepSpeed: what its documentation names, and where that is used
    "parallel/engine/engine.py": {"deepspeed", "deepspeed.utils"},  # initialize, set_z3_leaf_modules
    "parallel/engine/pipeline.py": {"deepspeed.pipe", "deepspeed.runtime.pipe.topology"},
    "parallel/engine/deepspeed_section.py": {"deepspeed.runtime.config"},
    "parallel/launch.py": {"deepspeed"},  # init_distributed
    "parallel/deepspeed_internals.py": None,
}
PRIVATE = (
    "ds_",
    "tensor_model_parallel",
    "_hp_",
    "hp_grad",
    "fp32_groups",
    "bf16_groups",
    "_global_grad_norm",
    "real_dp_process_group",
)


def sources() -> dict[str, ast.AST]:
    files = [file for package in ("model", "parallel", "data", "train") for file in (ROOT / package).rglob("*.py")]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_only_its_files_import_deepspeed() -> None:
    for name, tree in sources().items():
        found = {module for module in imported(tree) if module.split(".")[0] == "deepspeed"}
        allowed = PUBLIC.get(name, set())
        assert allowed is None or found <= allowed, name


def test_only_its_file_imports_megatron() -> None:
    users = [name for name, tree in sources().items() if "megatron" in {each.split(".")[0] for each in imported(tree)}]
    assert users == ["parallel/sharding/megatron.py"]


def test_no_other_file_names_what_is_private_to_deepspeed() -> None:
    for name, tree in sources().items():
        if name != "parallel/deepspeed_internals.py":
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not [each for each in names if each.startswith(PRIVATE)], name


def test_the_installed_deepspeed_has_all_names() -> None:
    deepspeed_internals.check_installed.__wrapped__()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("deepspeed.runtime.bf16_optimizer.BF16_Optimizer", "update_hp_grads"),
        ("deepspeed.runtime.bf16_optimizer.BF16_Optimizer", "get_grads_for_reduction"),
        ("deepspeed.runtime.pipe.engine", "BF16_Optimizer"),
        ("deepspeed.runtime.engine.DeepSpeedEngine", "buffered_allreduce_fallback"),
        ("deepspeed.pipe.PipelineModule", "_synchronize_tied_weights"),
        ("deepspeed.utils", "safe_get_local_fp32_param"),
    ],
)
def test_a_library_without_one_of_the_names_is_refused(owner: str, name: str) -> None:
    with mock.patch(f"{owner}.{name}"), pytest.raises(LibraryChangedError, match=name):  # takes *args, **kwargs
        deepspeed_internals.check_installed.__wrapped__()


def test_a_library_that_sets_other_attributes_is_refused() -> None:
    from deepspeed.runtime import bf16_optimizer

    class Renamed:
        def __init__(self) -> None:
            self.bf16_parameters: list[Any] = []

    methods = ("update_hp_grads", "backward_prologue", "clear_lp_grads", "get_grads_for_reduction", "step", "zero_grad")
    for name in methods:
        setattr(Renamed, name, getattr(bf16_optimizer.BF16_Optimizer, name))
    refused = pytest.raises(LibraryChangedError, match="sets no attribute optimizer")
    with mock.patch.object(bf16_optimizer, "BF16_Optimizer", Renamed), refused:
        deepspeed_internals.check_installed.__wrapped__()
    require_assigned("deepspeed", Renamed, "bf16_parameters")


def test_a_library_whose_norms_read_other_marks_is_refused() -> None:
    renamed = mock.patch("deepspeed.runtime.utils.is_model_parallel_parameter", lambda p: p.is_split)
    with renamed, pytest.raises(LibraryChangedError, match="does not read tensor_model_parallel of a parameter"):
        deepspeed_internals.check_installed.__wrapped__()
    renamed = mock.patch("deepspeed.runtime.constants.PIPE_REPLICATED", "ds_is_copy")
    with renamed, pytest.raises(LibraryChangedError, match="does not read ds_pipe_replicated of a parameter"):
        deepspeed_internals.check_installed.__wrapped__()


def test_only_the_same_parameters_replace_a_function() -> None:
    owner = SimpleNamespace(step=lambda a, b=1: None)
    replace("deepspeed", owner, "step", lambda a, b=2: "ours")
    assert owner.step(1) == "ours"
    with pytest.raises(LibraryChangedError, match=r"has SimpleNamespace.step\(a, b\), not step\(a\)"):
        replace("deepspeed", owner, "step", lambda a: None)
    with pytest.raises(LibraryChangedError, match=r"deepspeed .* has no SimpleNamespace.stop.*pip install 'deepspeed"):
        require("deepspeed", owner, "stop")
    assert owner.step(1) == "ours"


def test_a_call_that_a_function_does_not_take_is_refused() -> None:
    owner = SimpleNamespace(linear=lambda inputs, outputs, *, bias, group=None: None)
    require_arguments("deepspeed", owner, "linear", "inputs, outputs", "bias")
    require_arguments("deepspeed", owner, "linear", keywords="bias, group")
    for wrong in (("outputs, inputs", "bias"), ("inputs, outputs", "bias, norm"), ("", "norm")):
        with pytest.raises(
            LibraryChangedError, match=r"has SimpleNamespace.linear\(inputs, outputs, bias, group\), not"
        ):
            require_arguments("deepspeed", owner, "linear", *wrong)


def test_supported_versions_are_those_of_the_project() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for library, versions in SUPPORTED.items():
        assert f"{library}{versions}" in requirements
