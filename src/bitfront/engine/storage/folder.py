"""Names of the files in a run folder."""

from __future__ import annotations

from pathlib import Path

#: The file with the trials.
STORE = "trials.sqlite"
#: What workers on other machines read, while a search runs.
SHARED = "workers"
#: What trackers keep for later sessions.
TRACKING = "tracking.json"
#: The weights of the float model of the search.
WEIGHTS = Path("checkpoints") / "searched.pt"


def trial_weights(folder: Path, number: int) -> Path:
    """The trained weights of a trial that was on the front at the end of a search that trains its candidates."""
    return folder / "checkpoints" / f"trial-{number}.pt"


def finetuned_weights(folder: Path, number: int) -> Path:
    """The checkpoint of a trial that was fine-tuned."""
    return folder / "checkpoints" / f"finetuned-{number}.pt"
