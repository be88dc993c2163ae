"""Keep compiled code for the next start: in folders of this user alone, and only as long as our own code is the same.

What lies there is executed. torch's compiler would take a folder in /tmp whose name everybody can foresee, and run what
it finds there.
"""

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from data.errors import DataError
from data.files.address import user_cache_folder
from data.files.strict_json import to_json
from train.config import ConfigError
from train.start.facts import source_facts

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""The variables that name the folders of torch's compiler and of Triton, and the folders' names."""
ALLOWED = "autograd_cache_allow_custom_autograd_functions"
"""The setting of torch that keeps graphs with an autograd function; a version without it compiles them anew."""
COMPILED_SOURCES = ("source model/", "source parallel/")
"""What the names of facts about compiled code begin with."""


def keep_compiled_code_private() -> None:
    """Choose the folders of compiled code, unless the environment names them.

    Call this before megatron-core is imported: that already reads torch's folder, and enters it in the environment.
    Torch's own choice therefore does not count as named.

    They lie in the user's cache folder, or among the temporary files if there is none or it cannot be written.

    Raises:
        ConfigError: another user owns the folder, or may write to it.
    """
    unnamed = [variable for variable in VARIABLES if not _is_named(variable)]
    if not unnamed:
        return
    folder: Path | None = None
    with contextlib.suppress(DataError, OSError):
        folder = _made(user_cache_folder() / "compiled")
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"entropy-guided-transformer-{os.getuid()}"
        try:
            _made(folder)
        except OSError as error:
            raise ConfigError([f"{folder}: cannot be made for compiled code ({error.strerror}); {_REMEDY}"]) from None
    if fault := _fault(folder):
        raise ConfigError([f"{folder}: {fault}, and compiled code would be run from it; delete it, or {_REMEDY}"])
    for variable in unnamed:
        os.environ[variable] = str(folder / VARIABLES[variable])


@functools.cache
def key_compiled_code() -> None:
    """Make the next start find all compiled code of this one, unless our own code has changed since.

    torch finds compiled code by the graph that it has traced, by versions and by the device. The backward formulas of
    our operators are no part of the graph: after a change, torch would go on with the gradients of the old formula. So
    a digest of the code that graphs can call is made part of the key.

    By default torch leaves out graphs with an autograd function. Of those, it traces the backward pass into the graph.
    """
    import torch
    from torch._functorch import config as functorch_config

    files = {name: digest for name, digest in source_facts().items() if name.startswith(COMPILED_SOURCES)}
    torch.compiler.config.cache_key_tag = hashlib.sha256(to_json(files).encode()).hexdigest()[:16]
    if hasattr(functorch_config, ALLOWED):
        setattr(functorch_config, ALLOWED, True)


_REMEDY = f"name folders of your own with {' and '.join(VARIABLES)}"


def _is_named(variable: str) -> bool:
    """Whether the environment names a folder, other than what torch chooses and passes on to processes it starts."""
    value = os.environ.get(variable, "")
    return bool(value) and not value.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))


def _made(folder: Path) -> Path:
    """Make a folder, for this user alone, unless its name is taken; raise OSError if it cannot be made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    return folder


def _fault(folder: Path) -> str:
    """Say why code in a folder could be another user's; empty if it could not."""
    try:
        for found in (folder.lstat(), folder.stat()):  # of a link, and of what it leads to
            if found.st_uid != os.geteuid():
                return f"it belongs to user {found.st_uid}"
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "it is no folder"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    return ""
