"""This module opens the domains of a mixture, and gives each its share."""

from pathlib import Path

from titan_ext.loader.config_checks import check_domains, check_mixture
from titan_ext.loader.domain import Domain
from titan_ext.loader.shard_index import is_remote
from titan_ext.loader.shard_store import ShardStore


def open_domains(
    shards: str, mixture: dict[str, float], cache: Path, *, cache_bytes: int, seed: int, num_sections: int
) -> list[Domain]:
    """Return the domains of the mixture, or all domains of the folder, sorted by name.

    Args:
        shards: folder or address of a stage.
        mixture: domain -> share of the tokens; may be empty.
        cache: folder for unpacked shards.
        cache_bytes: limit for the raw shards in `cache`, in bytes.
        seed: seed of the order of documents.
        num_sections: number of sections that share the documents (`order.count_sections`).

    Raises:
        RefusedInput: the mixture or the shards cannot be used for training.
    """
    check_mixture(mixture)
    names = sorted(mixture) if is_remote(shards) else list_domains(shards)
    check_domains(shards, mixture, names)
    stores = {
        name: ShardStore(name, f"{shards.rstrip('/')}/{name}", cache, cache_bytes) for name in sorted(mixture or names)
    }
    return [Domain(name, store, seed=seed, num_sections=num_sections) for name, store in stores.items()]


def resolve_mixture(mixture: dict[str, float], domains: list[Domain]) -> dict[str, float]:
    """Return the share of each domain, in the order of `domains`.

    Without a mixture the shares are in proportion to the domains' sizes in bytes.
    """
    if mixture:
        return {domain.name: mixture[domain.name] for domain in domains}
    total = sum(domain.num_bytes for domain in domains)
    return {domain.name: domain.num_bytes / total for domain in domains}


def list_domains(shards: str) -> list[str]:
    """Return the names of the MDS folders directly below the stage folder `shards` (a local path), sorted."""
    return sorted(path.parent.name for path in Path(shards).glob("*/index.json"))
