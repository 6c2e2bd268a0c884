"""The model card and the licence note that travel with every artifact."""

from pathlib import Path

from eval.export.dimensions import dims_from_config
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.model_stats import count_parameters

_CARD = """---
license: other
library_name: {library}
tags: [mobilemoe, mixture-of-experts, on-device, int4]
---
# MobileMoE {total} ({active} active a token), {form}

| | |
|---|---|
| layers, width | {config.num_hidden_layers}, {config.hidden_size} |
| heads / key-value heads, size | {config.num_attention_heads} / {config.num_key_value_heads}, {config.head_dim} |
| routed experts, of which a token takes | {config.num_local_experts}, {config.num_experts_per_tok} |
| width of a routed expert, of the shared one | {config.intermediate_size}, {config.intermediate_size_mlp} |
| vocabulary, context | {config.vocab_size}, {config.max_position_embeddings} |

Architecture: arXiv 2605.27358. Trained and exported with the MobileMoE pipeline; the run's `manifest.json` names every
data source with its version, the recipe and the evaluation. `SHA256SUMS` covers every file of this folder.
"""

_LICENSE_NOTE = """This artifact joins parts under different terms. It grants no rights beyond theirs.

Weights: trained by whoever ran the pipeline, on the sources that the run's manifest.json names, each with its licence.
Which of them oblige the weights is for the publisher to decide before publishing.
Tokenizer: as it came. If it is Llama 3's, the Llama 3 Community License applies to it ("Built with Meta Llama 3").
Code in this folder (*.py): the MobileMoE pipeline's, under the pipeline's licence.
"""


def write_model_card(folder: Path, config: MobileMoEConfig, form: str) -> None:
    """Write README.md and LICENSE-NOTE.txt into an artifact's folder; `form` says what kind of artifact it is."""
    count = count_parameters(dims_from_config(config))
    library = "executorch" if "ExecuTorch" in form else "transformers"
    card = _CARD.format(
        config=config, form=form, library=library, total=_count(count.total), active=_count(count.active)
    )
    (folder / "README.md").write_text(card)
    (folder / "LICENSE-NOTE.txt").write_text(_LICENSE_NOTE)


def _count(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
