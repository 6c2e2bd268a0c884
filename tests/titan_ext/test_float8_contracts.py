"""torchao's float8 grouped product, which is a prototype without a public interface.

If it changes, experts in float8 (titan_ext/quantization/float8.py) fail on a GPU, or multiply with other roundings than
the emulation.
"""

import multiprocessing
from pathlib import Path


def trace_torchaos_product(path: Path) -> None:
    """Run torchao's own product on tensors without data: its checks of shapes and strides, and torch's."""
    import torch.utils._triton

    torch.utils._triton.has_triton = lambda: True  # read when torchao's kernels are imported
    from torch._subclasses.fake_tensor import FakeTensorMode

    from titan_ext.compat import multiply_grouped_in_float8

    with FakeTensorMode():
        a = torch.empty(96, 32, dtype=torch.bfloat16, requires_grad=True)
        b = torch.empty(3, 48, 32, dtype=torch.bfloat16, requires_grad=True)
        out = multiply_grouped_in_float8(a, b.transpose(-2, -1), torch.empty(3, dtype=torch.int32))
        out.sum().backward()
        shapes = [tuple(out.shape), tuple(a.grad.shape), tuple(b.grad.shape), out.dtype]
    path.write_text(repr(shapes))


def test_torchaos_product_takes_what_the_experts_give(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=trace_torchaos_product, args=(tmp_path / "shapes",))
    process.start()
    process.join(500)
    process.kill()
    assert (tmp_path / "shapes").read_text() == "[(96, 48), (96, 32), (3, 48, 32), torch.bfloat16]"
