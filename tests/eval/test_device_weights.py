"""The way of a checkpoint to the device program, and modules that must stay light."""

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from eval.device.expert_op import declare
from eval.device.transformer import moe_transformer
from eval.device.weights import DeviceWeights
from eval.export import int4
from eval.export.dimensions import config_from_dims
from eval.export.source import Source
from eval.hf_mobilemoe import checkpoint_mobilemoe
from tests.eval.tiny_checkpoint import DIMS, random_tensors
from titan_ext.quantization import formulas


class CountingTensors(Mapping):
    """Tensors by name that count how often each is read."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_a_checkpoint_is_quantized_once_and_never_packed_for_the_file(monkeypatch):
    """Every matrix is read and quantized once, the tied embedding too, and goes into the program's layout at once."""
    calls = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        for user in [m for m in sys.modules.values() if getattr(m, name, None) is function]:
            monkeypatch.setattr(user, name, counted)

    count(int4, "pack_int4")
    count(checkpoint_mobilemoe, "unpack_int4")
    count(checkpoint_mobilemoe, "dequantize_int4")
    count(formulas, "quantize_int4")
    declare()
    tensors = CountingTensors(random_tensors())
    moe_transformer(DeviceWeights(Source(tensors, config_from_dims(DIMS), Path())), 64, "stock")
    assert tensors.reads == Counter(dict.fromkeys(tensors.tensors, 1))
    matrices_a_layer = 4 + 3 + 2  # attention, shared expert, routed experts
    assert calls == {"quantize_int4": 1 + matrices_a_layer * DIMS.n_layers}


def test_publish_fetch_and_the_table_of_formats_import_no_torch():
    modules = (
        "pipelines.commands.publish, pipelines.commands.fetch, pipelines.commands.transfer, "
        "eval.export.artifact_folder, eval.export.model_card, eval.export.formats"
    )
    check = "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys, {modules}; {check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
