"""Compare the held-out loss of a run's pre-training with what the law predicts for its size and tokens."""

import json
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from pipelines.scaling.law import PUBLISHED, Law
from pipelines.scaling.points import read_run


def predict_run(run: Path, law: Law = PUBLISHED) -> dict[str, Any] | None:
    """Return the law's prediction for a run's pre-training beside the measured loss, in nats a token, JSON-ready.

    Losses a token compare only where the tokens are the same, so a run with another vocabulary gets no prediction.

    Returns:
        `comparable`, `predicted`, `interval`, `measured`, `text` (sentences for the report); None where the run has
        no held-out loss of its pre-training yet.
    """
    try:
        point = read_run(run)
    except RefusedInput:
        return None
    recipe = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    result: dict[str, Any] = {
        "comparable": False, "predicted": None, "interval": None, "measured": point.loss, "law": law.source,
    }  # fmt: skip
    name = law.source.partition(",")[0]
    own, vocabulary = recipe["model"]["vocab_size"], law.vocab_size
    if vocabulary != own:
        known = "is not recorded" if vocabulary is None else f"has {vocabulary:,} entries"
        reason = f"the vocabulary of its points {known}, this run's has {own:,}, and losses a token depend on it"
        return result | {"text": f"No prediction by the scaling law ({name}): {reason}."}
    if law is PUBLISHED and not recipe["data"]["tokenizer"]["path"]:
        reason = (
            "its points have Llama 3.1's tokenizer, this run trained one of its own, and losses a token depend on it"
        )
        return result | {"text": f"No prediction by the scaling law ({name}): {reason}."}
    loss = float(law.coefficients.predict_loss(point.active, point.tokens, point.experts))
    low, high = law.predict_interval(point.active, point.tokens, point.experts)
    text = (
        f"The scaling law ({name}) predicts {loss:.4f} nats a token after pre-training, 95% interval {low:.4f} "
        f"to {high:.4f}, for {point.active / 1e6:,.0f}M active parameters, {point.experts:g} coarse experts and "
        f"{point.tokens:.3g} tokens; measured: {point.loss:.4f}, {point.loss - loss:+.4f}."
    )
    notes = law.describe_extrapolation(point.active, point.tokens, point.experts)
    if law is PUBLISHED:
        notes.append("held-out text and mixture of the published points are not public, so they differ from this run's")
    sentences = [text, *(f"{note[0].upper()}{note[1:]}." for note in notes)]
    return result | {"comparable": True, "predicted": loss, "interval": [low, high], "text": " ".join(sentences)}
