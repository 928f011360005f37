"""The conformance suite of export targets: what every target must do. The tests of each target run it.

from bitfront.testing import check_target
check_target("c", candidate, x, folder)
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from bitfront.errors import ExportError
from bitfront.exporters.exporting import Exported, export, target_named
from bitfront.exporters.targets.base import Candidate, Target


def check_target(
    name: str | Target, candidate: Candidate, x: Tensor, folder: Path, *, refusal: str = "", judged: bool = True
) -> Exported | None:
    """Assert that a target writes a candidate so that its judge computes the same numbers, or refuses it by name.

    Args:
        name: the registered name of the target, or the target itself.
        candidate: a small network with its formats.
        x: samples for it, float32 of shape ``(samples, *features)``.
        folder: where the files go; does not exist, and its parent is empty.
        refusal: a regular expression. If it is given, the target must refuse the candidate with a message that has it.
        judged: whether the judge runs the files; without it they are only written.

    Returns:
        What was written, for further tests; None if the candidate was refused.

    Raises:
        AssertionError: a promise is broken; the message says which.
        MissingExtraError: a package that the target needs is not installed.
    """
    target = name if isinstance(name, Target) else target_named(name)
    title = type(target).__name__
    assert (type(target).__doc__ or "").strip(), (
        f"{title} needs a docstring: `bitfront list targets` shows its first line"
    )
    try:
        result = export(candidate, target, folder, x, check=judged)
    except ExportError as error:
        assert refusal, f"{title} refuses {candidate.name}: {error}"
        assert re.search(refusal, str(error)), f"{title} refuses {candidate.name} for another reason: {error}"
        assert not list(folder.parent.iterdir()), f"{title} leaves files of a candidate that it refuses"
        return None
    assert not refusal, f"{title} takes {candidate.name}, which it was to refuse"
    if not judged:
        assert result.samples == 0, f"{title}: files that nothing has run are called compared"
        return result
    assert result.samples == len(x), f"{title}: compared on {result.samples} of {len(x)} samples"
    assert result.differing == 0 or not target.exact(candidate), f"{title}: {result.differing} samples differ"
    assert result.alike >= 0.9 * len(x), f"{title}: only {result.alike} of {len(x)} samples have the same answer"
    written = {p.name for p in folder.iterdir()}
    missing = {file.partition("/")[0] for file in result.files} - written
    assert not missing, f"{title}: {sorted(missing)} are listed, and are not there"
    assert target.judge in (folder / "README.md").read_text(encoding="utf-8"), f"{title}: README.md has no judge"
    return result
