"""Initial weights that do not depend on the layout (6 in titan_ext/cpu/__init__.py)."""

import functools
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor, Replicate

from titan_ext.cpu.device import IS_CPU
from titan_ext.dtensor import local


def normal_init(std: float) -> Callable[[torch.Tensor], object]:
    """Return an initializer that fills a parameter in place with normal values of mean 0 and standard deviation `std`.

    The full tensor is the same under every layout.
    """
    if not IS_CPU:
        return functools.partial(torch.nn.init.normal_, std=std)

    @torch.no_grad()
    def fill(parameter: torch.Tensor) -> None:
        full = torch.nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)
        if isinstance(parameter, DTensor):  # every rank has the same seed, so every rank drew the same full tensor
            mesh = parameter.device_mesh
            full = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
            full = full.redistribute(placements=parameter.placements).to_local()
        local(parameter).copy_(full)

    return fill
