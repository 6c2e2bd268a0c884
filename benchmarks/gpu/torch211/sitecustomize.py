"""Lets this project run on torch 2.11, where a machine with a GPU has that and no network (benchmarks/gpu/pack.py).

Python imports this file at its start, because its folder is on PYTHONPATH. Under any other torch it does nothing.
FSDP2 of the torch in requirements.lock takes the place of that of 2.11: it is pure Python, and 2.11's lacks several
groups of parameters a unit. `torch211_shim` has the names that torchtitan and that FSDP2 import and 2.11 lacks.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))
FSDP = "torch.distributed.fsdp._fully_shard"


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the copy under the name of torch's own file, because Dynamo decides by the file what it traces."""

    def path_stats(self, path: str) -> dict:
        raise OSError("no bytecode is cached: it would have the name of the copy")

    def source_to_code(self, data, path, *, _optimization=-1):
        folder = os.path.join(os.path.dirname(sys.modules["torch"].__file__), "distributed", "fsdp", "_fully_shard")
        file = os.path.join(folder, os.path.basename(path))
        return compile(data, file, "exec", dont_inherit=True, optimize=_optimization)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ != FSDP:
            super().exec_module(module)
            return
        import torch211_shim
        from torch.distributed.fsdp import _common_utils

        torch211_shim.add_fsdp_helpers(_common_utils)
        super().exec_module(module)
        # torch.distributed.fsdp of 2.11 does not pass this name on.
        sys.modules["torch.distributed.fsdp"].DataParallelMeshDims = module.DataParallelMeshDims


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of FSDP2 in the copy, and loads the shim before anything that needs it."""

    def find_spec(self, name, path=None, target=None):
        if name in ("torchtitan", FSDP):
            sys.meta_path.remove(self)
            import torch211_shim  # noqa: F401  # its import adds the names

            sys.meta_path.insert(0, self)
        if name != FSDP and not name.startswith(f"{FSDP}."):
            return None
        file = os.path.join(HERE, "torch211_fsdp", f"{name[len(FSDP) + 1 :] or '__init__'}.py")
        package = [os.path.dirname(file)] if name == FSDP else None
        return importlib.util.spec_from_file_location(
            name, file, loader=_Loader(name, file), submodule_search_locations=package
        )


def _is_torch_211() -> bool:
    try:
        return importlib.metadata.version("torch").startswith("2.11.")
    except importlib.metadata.PackageNotFoundError:
        return False


if _is_torch_211():
    sys.meta_path.insert(0, _Finder())
