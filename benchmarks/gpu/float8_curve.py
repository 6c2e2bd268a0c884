"""Loss of a small model whose blocks multiply in float8, beside bfloat16 and float32, on the CPU's emulation.

    python -m benchmarks.gpu.float8_curve [--steps 60]

The same weights train on the same tokens three times, on one thread: text of a source in which each of 256 tokens has 8
possible successors, so that there is something to learn. Master weights and AdamW are float32; float8 rounds as
torchao's kernels do (titan_ext/quantization/float8.py). It prints the loss of every tenth of the steps, and the
differences over the last fifth in nats.
"""

import argparse
import dataclasses
import json
import statistics

import torch
import torch.nn.functional as F

from titan_ext.config import FLAVORS
from titan_ext.mobilemoe import model_config
from titan_ext.quantization.float8 import convert_to_float8

DIMS = dataclasses.replace(FLAVORS["tiny"], n_layers=2, vocab_size=256)
BATCH, SEQ_LEN, SUCCESSORS, LEARNING_RATE = 4, 128, 8, 3e-3


def draw_tokens(steps: int) -> torch.Tensor:
    """Return int64 tokens [steps, BATCH, SEQ_LEN + 1] of the source."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(0, DIMS.vocab_size, (DIMS.vocab_size, SUCCESSORS), generator=generator)
    tokens = torch.empty(steps, BATCH, SEQ_LEN + 1, dtype=torch.int64)
    tokens[..., 0] = torch.randint(0, DIMS.vocab_size, (steps, BATCH), generator=generator)
    for position in range(SEQ_LEN):
        which = torch.randint(0, SUCCESSORS, (steps, BATCH), generator=generator)
        tokens[..., position + 1] = successors[tokens[..., position], which]
    return tokens


def train(products: str, tokens: torch.Tensor) -> list[float]:
    """Return the loss of every step, in nats a token.

    Args:
        products: `float32`, `bfloat16` or `float8`.
    """
    config = model_config(DIMS)
    model = (convert_to_float8(config) if products == "float8" else config).build()
    torch.manual_seed(0)
    model.init_states()
    dtype = torch.float32 if products == "float32" else torch.bfloat16
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE)
    positions = torch.arange(SEQ_LEN).repeat(BATCH, 1)
    losses = []
    for step, batch in enumerate(tokens):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 20)
        cast = {name: weight if "router" in name else weight.to(dtype) for name, weight in weights.items()}
        logits = torch.func.functional_call(model, cast, (batch[:, :-1],), {"positions": positions})
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train three times and print the curves and their differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    tokens = draw_tokens(steps)
    curves = {products: train(products, tokens) for products in ("float32", "bfloat16", "float8")}
    tenth, last = max(1, steps // 10), max(1, steps // 5)
    ends = {products: statistics.mean(losses[-last:]) for products, losses in curves.items()}
    result = {
        "steps": steps,
        "loss_of_every_tenth": {
            products: [round(statistics.mean(losses[i : i + tenth]), 4) for i in range(0, steps, tenth)]
            for products, losses in curves.items()
        },
        "loss_of_the_last_fifth": ends,
        "float8_minus_bfloat16": ends["float8"] - ends["bfloat16"],
        "bfloat16_minus_float32": ends["bfloat16"] - ends["float32"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
