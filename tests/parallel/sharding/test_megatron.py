"""Test that an installed megatron-core that lacks what this project uses is refused with one clear error."""

import importlib.util
import inspect
from typing import Any
from unittest import mock

import pytest

from parallel.libraries import LibraryChangedError
from parallel.sharding import megatron
from parallel.sharding.megatron import check_installed, mcore, parallel_state


class Reordered:
    """A layer whose positional arguments have changed places."""

    def __init__(self, output_size: int, input_size: int, *, config: Any, init_method: Any, bias: bool) -> None:
        self.weight = self.sequence_parallel = None


def without(function: Any, name: str) -> Any:
    """Return a function that takes one parameter fewer."""
    signature = inspect.signature(function)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != name]
    return mock.Mock(__signature__=signature.replace(parameters=kept))


def test_the_installed_version_has_everything() -> None:
    check_installed()


def test_a_missing_function_is_named_with_versions_and_remedy() -> None:
    with mock.patch.object(parallel_state, "get_embedding_group"):
        del parallel_state.get_embedding_group
        message = r"megatron-core 0\.\d+.* has no megatron\.core\.parallel_state\.get_embedding_group.*pip install"
        with pytest.raises(LibraryChangedError, match=message):
            check_installed()


@pytest.mark.parametrize(
    ("owner", "name", "parameter"),
    [
        (parallel_state, "initialize_model_parallel", "create_gloo_process_groups"),
        (parallel_state, "get_data_parallel_group", "with_context_parallel"),
        (mcore, "copy_to_tensor_model_parallel_region", "group"),
        (megatron.megatron.core, "ModelParallelConfig", "gradient_accumulation_fusion"),
    ],
)
def test_a_function_that_takes_one_argument_fewer_is_refused(owner: Any, name: str, parameter: str) -> None:
    changed = mock.patch.object(owner, name, without(getattr(owner, name), parameter))
    with changed, pytest.raises(LibraryChangedError, match=rf"has .*{name}\(.*\), not \(.*{parameter}"):
        check_installed()


def test_a_layer_with_other_positional_arguments_is_refused() -> None:
    changed = mock.patch.object(mcore, "ColumnParallelLinear", Reordered)
    with changed, pytest.raises(LibraryChangedError, match=r"ColumnParallelLinear\(output_size, input_size"):
        check_installed()


def test_a_layer_without_an_attribute_is_refused() -> None:
    class Renamed(Reordered):
        def __init__(self, input_size: int, output_size: int, **named: Any) -> None:
            self.weight = None

        __signature__ = inspect.signature(mcore.RowParallelLinear)

    changed = mock.patch.object(mcore, "RowParallelLinear", Renamed)
    with changed, pytest.raises(LibraryChangedError, match=r"sets no attribute sequence_parallel in .*Renamed"):
        check_installed()


def test_importing_the_file_checks() -> None:
    spec = importlib.util.spec_from_file_location("again", megatron.__file__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with mock.patch.object(mcore, "VocabParallelEmbedding", Reordered), pytest.raises(LibraryChangedError):
        spec.loader.exec_module(again)
