"""Artifact folders: written beside their place, complete with checksums before they appear. Imports no torch.

SHA256SUMS covers every file of an artifact and can be checked by `sha256sum -c`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.atomic import atomic_write, remove
from core.checksums import CHECKSUMS, write_checksums
from core.errors import RefusedInput
from core.inside import Folder
from eval.export.bill_of_materials import write_bill


@contextmanager
def new_folder(out: Path, made_from: Path | None) -> Iterator[Path]:
    """Yield a folder `out`.partial to write into; when the block ends well it becomes `out`.

    It gets a bill of materials and checksums before. An earlier artifact at `out`, recognized by its checksums, is
    replaced.

    Args:
        made_from: as `write_bill`.

    Raises:
        RefusedInput: something else is at `out`.
        DamagedData: somebody put another folder or a link in the place of the one that was being written; or as
            `write_bill`.
    """
    out = Path(out)
    if out.exists() and not (out / CHECKSUMS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RefusedInput(f"{out} exists and is not an earlier export; choose another folder or remove it")
    with atomic_write(out) as partial:
        partial.mkdir()
        with Folder(partial) as held:
            yield partial
            held.require_in_place()
            write_bill(partial, out.name, made_from)
            write_checksums(partial)
            held.require_in_place()
        remove(out)
