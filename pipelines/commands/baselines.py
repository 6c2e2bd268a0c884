"""Published models by name: fetched from the Hugging Face hub, once."""

import glob
from pathlib import Path

from core.atomic import atomic_write
from core.cache import cache_dir
from core.errors import RefusedInput
from core.inside import check_names

PREFIX = "baseline:"
"""Beginning of the name of a baseline, where a command takes a model folder."""
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files of a repository that a model is loaded from; others, such as weights in other formats, stay there."""


def fetch_baseline(name: str) -> Path:
    """Return the folder of a baseline, in the cache; a folder that was fetched whole is kept.

    The hub's own variables count: HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY.

    Args:
        name: `baseline:NAME`.

    Raises:
        RefusedInput: there is no such baseline, no repository of it is known, or the hub does not give it, or lists a
            name that would lead out of the folder.
    """
    from eval.benchmarks.baselines import BASELINES

    key = name.removeprefix(PREFIX)
    if key not in BASELINES:
        raise RefusedInput(f"{name}: no such baseline; choose one of {', '.join(BASELINES)}")
    repository = BASELINES[key].hub_id
    if repository is None:
        raise RefusedInput(f"{name}: no repository of it is known; give a folder that holds the model")
    folder = cache_dir() / "baselines" / key
    if not folder.exists():
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
        from huggingface_hub.utils import filter_repo_objects

        try:
            listed = [file.rfilename for file in HfApi().model_info(repository).siblings or []]
            names = list(filter_repo_objects(listed, allow_patterns=FILES))
            # snapshot_download joins a name to the folder as it is, and a mirror may list any.
            check_names(names, f"{name}: {repository}")
            with atomic_write(folder, keep_partial=True) as partial:
                snapshot_download(repository, local_dir=partial, allow_patterns=[glob.escape(file) for file in names])
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise RefusedInput(
                f"{name}: the hub did not give {repository}: {error}. Set HF_TOKEN where its licence must be "
                "accepted, or fetch it elsewhere and give the folder"
            ) from error
    return folder
