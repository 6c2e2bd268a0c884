"""The model card and the licence note that travel with every artifact. Imports neither torch nor transformers."""

from pathlib import Path

from titan_ext.config import ModelDims
from titan_ext.model_stats import count_parameters

_CARD = """---
license: other
license_name: see-license-note
license_link: LICENSE-NOTE.txt
library_name: {library}
tags: [mobilemoe, mixture-of-experts, on-device, int4]
---
# MobileMoE {total} ({active} active a token), {form}

| | |
|---|---|
| layers, width | {dims.n_layers}, {dims.d_model} |
| heads / key-value heads, size | {dims.n_heads} / {dims.n_kv_heads}, {dims.head_dim} |
| routed experts, of which a token takes | {dims.n_experts}, {dims.top_k} |
| width of a routed expert, of the shared one | {dims.expert_hidden}, {dims.shared_hidden} |
| vocabulary, context | {dims.vocab_size}, {dims.max_seq_len} |

Architecture: arXiv 2605.27358. Trained and exported with the MobileMoE pipeline; the run's `manifest.json` names every
data source with its version, the recipe and the evaluation. `SHA256SUMS` covers every file of this folder.

Licences: the code in this folder is under Apache-2.0. The weights and the tokenizer have terms of their own, which
`LICENSE-NOTE.txt` names.
"""

_LICENSE_NOTE = """The parts of this artifact are under different terms, and it grants no rights beyond those terms.

Weights: they were trained on the sources that the run's manifest.json names, each with its licence. Whoever publishes
the weights must decide before publishing which of these licences apply to them.
Tokenizer: it is copied unchanged. If it is Llama 3's, the Llama 3 Community License applies to it ("Built with Meta
Llama 3").
Code in this folder (*.py): Apache License 2.0, as the MobileMoE pipeline that it is copied from.
"""


def write_model_card(folder: Path, dims: ModelDims, form: str) -> None:
    """Write README.md and LICENSE-NOTE.txt into an artifact's folder; `form` says what kind of artifact it is."""
    count = count_parameters(dims)
    library = "executorch" if "ExecuTorch" in form else "transformers"
    card = _CARD.format(
        dims=dims, form=form, library=library, total=_format_count(count.total), active=_format_count(count.active)
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "LICENSE-NOTE.txt").write_text(_LICENSE_NOTE, encoding="utf-8")


def _format_count(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
