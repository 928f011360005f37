"""Where things are in a run folder."""

from __future__ import annotations

from pathlib import Path

#: The trials, in the run folder.
STORE = "trials.sqlite"
#: The weights that a search's trials are made of, in its run folder.
WEIGHTS = Path("checkpoints") / "searched.pt"


def trial_weights(folder: Path, number: int) -> Path:
    """The trained weights of a trial that was on the front at the end of a search that trains its candidates."""
    return folder / "checkpoints" / f"trial-{number}.pt"


def finetuned_weights(folder: Path, number: int) -> Path:
    """The checkpoint of a trial that was fine-tuned."""
    return folder / "checkpoints" / f"finetuned-{number}.pt"
