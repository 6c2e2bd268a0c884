"""Write the solution of the law as a Python file that `mobilemoe run FILE` trains."""

from dataclasses import asdict, fields
from pathlib import Path

from core.atomic import write_text
from core.errors import RefusedInput
from pipelines.scaling.law import Law
from pipelines.scaling.solve import Candidate
from titan_ext.config import ModelDims

WORLD_SIZE = 64
"""Number of GPUs of a written recipe; the user changes it in the file or with --parallel.world-size."""
TEMPLATE = '''\
"""A MobileMoE of {total:.2f}B parameters, {active:.0f}M of them active: an answer of `mobilemoe scaling-law solve`.

E = {experts} coarse experts. Weights and KV cache take {memory:.2f} GB. The law predicts a loss of {loss:.4f} nats a
token after {tokens:.4g} tokens.
Law: {source}.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import build_published
from titan_ext.config import ModelDims


def recipe() -> Recipe:
    """Return the published schedule for this model."""
    model = ModelDims(
{dimensions}
    )
    return build_published("{name}", model, world_size={world_size}, pretrain_tokens={tokens:.6g})
'''


def write_recipe_file(path: Path, candidate: Candidate, law: Law) -> None:
    """Write the recipe of a candidate.

    Raises:
        RefusedInput: the file exists, or its name does not end in .py.
    """
    if path.suffix != ".py":
        raise RefusedInput(f"--write-recipe {path}: a recipe is a Python file; let its name end in .py")
    if path.exists():
        raise RefusedInput(f"--write-recipe {path}: exists; name another file, or remove it")
    dims = candidate.dims
    shown = [field.name for field in fields(ModelDims) if field.name not in ("rope_scaling",)]
    values = asdict(dims)
    content = TEMPLATE.format(
        total=candidate.count.total / 1e9,
        active=candidate.count.active / 1e6,
        experts=candidate.experts,
        memory=candidate.memory / 1e9,
        loss=candidate.predict_loss(law),
        tokens=candidate.tokens,
        source=law.source,
        dimensions="\n".join(f"        {name}={values[name]!r}," for name in shown),
        name=path.stem,
        world_size=WORLD_SIZE,
    )
    write_text(path, content)
