"""`ModelInput`: the model that a command evaluates, wherever it lies."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from core.errors import RefusedInput
from core.stages import BASE_STAGES, STAGE_FOLDERS
from pipelines.commands import inputs
from pipelines.commands.baselines import PREFIX, fetch_baseline
from pipelines.commands.checkpoints import describes_itself, find_opener, find_run_of_checkpoint


class ModelInput:
    """The model that a command names. It is checked first, and opened as a Hugging Face folder later."""

    def __init__(self, checkpoint: Path, weights: Literal["bf16", "int4"] | None):
        """Check the input; nothing large is read yet.

        Raises:
            RefusedInput: no folder, no model in it, or `weights` given for what has them in one form.
        """
        self.checkpoint = checkpoint
        self.is_baseline = str(checkpoint).startswith(PREFIX)
        self._run: Path | None = None
        if not self.is_baseline:
            inputs.require_folder("CHECKPOINT", checkpoint)
            self._opener = find_opener(checkpoint)
            self._is_dcp = (checkpoint / ".metadata").is_file()
            if self._is_dcp and not describes_itself(checkpoint):
                self._run = find_run_of_checkpoint(checkpoint)
        if weights and (self.is_baseline or not self._is_dcp):
            raise RefusedInput(f"--weights {weights}: {checkpoint} has its weights in one form; leave the option out")
        is_qat = STAGE_FOLDERS["qat"].split("/")[-1] in self._parts
        self._weights = weights or ("int4" if is_qat else "bf16")

    @property
    def _parts(self) -> tuple[str, ...]:
        """Names of the folders from the run to its checkpoint."""
        if self._run is None:
            return ()
        return self.checkpoint.absolute().relative_to(self._run.absolute()).parts

    @property
    def is_base(self) -> bool:
        """Return whether it is a checkpoint of a stage before instruction tuning. Folders do not tell."""
        names = [Path(STAGE_FOLDERS[stage]).name for stage in BASE_STAGES]
        return any(name in self._parts for name in names)

    def place_results(self, suite: str) -> Path:
        """Return the folder of the results where none is given."""
        if self.is_baseline:
            return Path(f"{str(self.checkpoint).replace(':', '-')}-{suite}")
        if self._run is None:
            return inputs.beside(self.checkpoint, f"-{suite}")
        # Not beside it: a training that resumes reads the names of that folder.
        names = [name for name in self._parts if name not in ("stages", "checkpoint")]
        return self._run / "eval" / "checkpoints" / "-".join([*names, suite])

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Yield a Hugging Face folder: the user's own, a baseline's, or that of a checkpoint, for as long as needed.

        Raises:
            RefusedInput: the checkpoint is damaged, or the hub does not give the baseline.
        """
        if self.is_baseline:
            yield fetch_baseline(str(self.checkpoint))
        elif not self._is_dcp:
            yield self.checkpoint
        else:
            from eval.export.formats import FORMATS, ExportOptions

            with tempfile.TemporaryDirectory(prefix="mobilemoe-eval-") as scratch:
                source, config = self._opener()
                FORMATS[self._weights].write(source, Path(scratch) / "model", ExportOptions(export=config))
                yield Path(scratch) / "model"
