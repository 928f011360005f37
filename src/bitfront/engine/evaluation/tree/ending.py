"""What is made of the outputs of the final states of a pass: compiled scores, or the results per sample of any task.

Compiled scores are those of a classification: all states of a part go through one call of a kernel. Other tasks get the
outputs of one state after the other, as one call of the deployed model gives them. Outputs themselves are only kept of
a few samples (``output_itself``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitfront import kernels
from bitfront.engine.evaluation.tree import activations
from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints
from bitfront.engine.evaluation.tree.execution import Value, batched
from bitfront.kernels.losses import Outputs

T = TypeVar("T")
#: (numbers of some final states, their losses, their numbers of correct answers).
Scored = tuple[Ints, Tensor, Tensor]
#: Number of a final state → by name, something with a row for each sample.
Rows = dict[int, Mapping[str, Tensor]]


class Ending(Protocol[T]):
    """How passes end."""

    def of(self, value: Value, y: Tensor) -> T:
        """What is made of the outputs of some final states, for the targets of the samples."""
        ...

    def joined(self, parts: Sequence[list[T]]) -> list[T]:
        """What is made of the same states on several sets of samples, one set after the other, as of one set."""
        ...


@dataclass(frozen=True)
class CompiledScores:
    """Losses and right answers of a classification; targets are labels as int32.

    Attributes:
        outputs: what the model's outputs are.
    """

    outputs: Outputs

    def of(self, value: Value, y: Tensor) -> Scored:
        """The sums over the samples. Raises TypeError where outputs do not have the shape (samples, classes)."""
        output = batched(value, len(y))
        if output is None or len(output.features) != 1:
            raise TypeError("the model's output is not a tensor of shape (samples, classes)")
        if not output.whole:
            output = output.compact()
        if output.ceiling < float("inf"):
            output = output.settled()
        if output.layout == "first":
            logits = [p.flatten(0, 1) for p in output.parts]
        else:
            logits = [p.permute(0, 2, 3, 1).flatten(0, 1) for p in output.parts]
        results = [kernels.score(z, y, rectify=output.rectify, outputs=self.outputs) for z in logits]
        if output.irregular is None:
            return (output.states, *results[0])
        loss, correct = (torch.cat(column) for column in zip(*results, strict=True))
        widths = np.array([p.shape[activations.COLUMNS[output.layout]] for p in output.parts])
        offsets = np.concatenate([[0], np.cumsum([len(z) for z in logits])])
        part, row, column = output.where.T
        index = torch.from_numpy(offsets[part] + row * widths[part] + column).to(loss.device)
        return output.states, loss[index], correct[index]

    def joined(self, parts: Sequence[list[Scored]]) -> list[Scored]:
        """The sums of all."""
        losses: dict[int, Tensor] = {}
        hits: dict[int, Tensor] = {}
        for scored in parts:
            scores = {int(s): (a, b) for states, loss, hit in scored for s, a, b in zip(states, loss, hit, strict=True)}
            for s, (a, b) in scores.items():
                losses[s] = losses[s] + a if s in losses else a
                hits[s] = hits[s] + b if s in hits else b
        return [(np.array(list(losses)), torch.stack(list(losses.values())), torch.stack(list(hits.values())))]


@dataclass(frozen=True)
class PerSample:
    """Something of each sample, for one state after the other.

    Attributes:
        of_output: (the output of one state, the targets) → by name, something with a row for each sample.
    """

    of_output: Callable[[object, Tensor], Mapping[str, Tensor]]

    def of(self, value: Value, y: Tensor) -> Rows:
        """That of each state. Raises what ``of_output`` raises."""
        rows: Rows = {}
        for position, state in enumerate(value.states.tolist()):
            output = value.tensor(position) if isinstance(value, BatchedActivations) else value.values[position]
            rows[state] = self.of_output(output, y)
        return rows

    def joined(self, parts: Sequence[list[Rows]]) -> list[Rows]:
        """That of all samples, in their order."""
        sets = [{state: found for rows in part for state, found in rows.items()} for part in parts]
        return [
            {state: {name: torch.cat([of[state][name] for of in sets]) for name in found} for state, found in first}
            for first in [sets[0].items()]
        ]


def output_itself(output: object, y: Tensor) -> dict[str, Tensor]:  # noqa: ARG001
    """The output, float32, on the CPU. Raises TypeError where it is no tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns a {type(output).__name__}, and not one tensor")
    return {"output": output.float().cpu().clone()}
