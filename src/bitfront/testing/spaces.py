"""The conformance suite of spaces: what every space must do. The tests of each kind of space run it.

from bitfront.testing import check_space
check_space(build_my_space(request))
"""

from __future__ import annotations

import itertools
import json

import numpy as np

from bitfront.spaces.base import Codes, Space
from bitfront.spaces.described import DescribedSpace
from bitfront.spaces.model_space import FormatSpace, ModelSpace
from bitfront.spaces.quantize import single

#: Spaces up to this size are checked whole; of larger ones both ends and random candidates.
WHOLE = 4096


def check_space(space: Space, *, seed: int = 0) -> None:
    """Assert that `space` keeps the contract of :class:`bitfront.spaces.base.Space`, and, where it is one, that of
    :class:`bitfront.spaces.model_space.ModelSpace`.

    Args:
        space: of any kind.
        seed: random seed of the candidates that are drawn.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    rng = np.random.default_rng(seed)
    codes, consecutive = _candidates(space, rng)
    _check_codes(space, codes)
    for part in consecutive:
        _check_order(space, part)
    _check_canonical(space, rng)
    _check_sample(space, rng)
    _check_unseen(space, codes)
    for code in codes[:: max(1, len(codes) // 16)]:
        _check_neighbours(space, code)
    if isinstance(space, ModelSpace):
        for code in codes[:: max(1, len(codes) // 32)]:
            _check_spelling(space, code)
        _check_uniform(space)
        _check_sides(space, codes)
        json.dumps(space.description)
    if isinstance(space, FormatSpace):
        for code in codes[:: max(1, len(codes) // 32)]:
            _check_formats(space, code)


def _candidates(space: Space, rng: np.random.Generator) -> tuple[Codes, list[Codes]]:
    """(candidates to check, parts of the space with consecutive candidates)."""
    if space.size <= WHOLE:
        everything = space.numbered(0, space.size)
        assert len(everything) == space.size, f"numbered gives {len(everything)} candidates of {space.size}"
        assert len(space.numbered(0, space.size + 10)) == space.size, "numbered goes on after the last candidate"
        assert len(_distinct(everything)) == space.size, "numbered gives a candidate twice"
        start = space.size // 3
        assert np.array_equal(space.numbered(start, space.size), everything[start:]), "numbers depend on the start"
        return everything, [everything]
    first, last = space.numbered(0, 300), space.numbered(space.size - 300, space.size)
    for part in (first, last):
        assert len(_distinct(part)) == 300, "numbered gives a candidate twice"
    return np.concatenate([first, space.sample(300, rng), last]), [first, last]


def _distinct(codes: Codes) -> set[bytes]:
    return {c.tobytes() for c in codes}


def _check_codes(space: Space, codes: Codes) -> None:
    assert len(space.cardinalities) == len(space.parameters), "one cardinality per parameter is needed"
    for parameter, count in zip(space.parameters, space.cardinalities, strict=True):
        assert len(parameter.labels) == count >= 2, f"{parameter.name} must have as many labels as values, at least 2"
    names = [p.name for p in space.parameters]
    assert len(set(names)) == len(names), f"two parameters have the name {max(names, key=names.count)}"
    assert codes.dtype == np.int64, f"codes are {codes.dtype}, not int64"
    space.check(codes)
    if len(codes) and len(space.parameters):
        for value in (-1, int(space.cardinalities[-1])):
            wrong = codes[:1].copy()
            wrong[0, -1] = value
            _refused(space, wrong)
    _refused(space, np.zeros((1, len(space.parameters) + 1), dtype=np.int64))
    before = codes.copy()
    options = space.options(codes)
    assert options.shape == (len(codes), len(space.groups)), "options must have one column per group"
    for g, group in enumerate(space.groups):
        assert options[:, g].min() >= 0, f"an option of {group.name} is negative"
        assert options[:, g].max() < group.size, f"an option of {group.name} does not exist"
    assert np.array_equal(space.codes(options), codes), "codes(options(code)) is another code"
    assert np.array_equal(codes, before), "the codes given were changed"
    assert len(np.unique(options, axis=0)) == len(_distinct(codes)), "two candidates take the same options"


def _refused(space: Space, codes: Codes) -> None:
    try:
        space.check(codes)
    except ValueError:
        return
    raise AssertionError(f"check accepts {codes.tolist()}")


def _check_order(space: Space, codes: Codes) -> None:
    options = [tuple(row) for row in space.options(codes).tolist()]
    assert all(a < b for a, b in itertools.pairwise(options)), (
        "candidates are not ordered by their options: consecutive ones must agree on the leading groups"
    )


def _check_canonical(space: Space, rng: np.random.Generator) -> None:
    raw = rng.integers(0, space.cardinalities, (200, len(space.parameters)))
    canonical = space.canonical(raw)
    assert np.array_equal(space.canonical(canonical), canonical), "canonical is not idempotent"
    assert np.array_equal(space.options(canonical), space.options(raw)), "canonical changes what a code means"
    for column, parameter in enumerate(space.parameters):
        if parameter.branch is not None:
            effective = canonical[:, column] == raw[:, column]
            assert bool((effective | (canonical[:, column] == 0)).all()), f"{parameter.name} has no effect and is not 0"


def _check_sample(space: Space, rng: np.random.Generator) -> None:
    seed = int(rng.integers(2**32))
    drawn = space.sample(64, np.random.default_rng(seed))
    assert drawn.shape == (64, len(space.parameters)), "sample gives another number of candidates"
    assert np.array_equal(drawn, space.canonical(drawn)), "sample gives codes that are not canonical"
    assert np.array_equal(drawn, space.sample(64, np.random.default_rng(seed))), "sample is not reproducible"


def _check_unseen(space: Space, codes: Codes) -> None:
    if space.size > WHOLE:
        return
    rest = codes[1::2]
    unseen = [code.tolist() for code in space.unseen(_distinct(codes[::2]))]
    assert unseen == rest.tolist(), "unseen does not give all other candidates in order"


def _check_neighbours(space: Space, code: Codes) -> None:
    near = space.neighbours(code)
    assert near.shape[1:] == (len(space.parameters),), f"neighbours have shape {near.shape}"
    assert np.array_equal(near, space.canonical(near)), "a neighbour is not canonical"
    keys = _distinct(near)
    assert len(keys) == len(near), "neighbours gives a candidate twice"
    assert code.tobytes() not in keys, "a candidate is a neighbour of itself"
    if len(near):
        options = space.options(near)
        changed = (options != space.options(code[None])).sum(axis=1)
        assert bool((changed == 1).all()), "a neighbour differs in more than one group"
    reachable = sum(
        int(count) - 1 for column, count in enumerate(space.cardinalities) if space.parameters[column].branch is None
    )
    assert len(near) >= reachable, f"there are {len(near)} neighbours, and at least {reachable} differ in one parameter"


def _check_spelling(space: ModelSpace, code: Codes) -> None:
    config = space.decode(code)
    assert np.array_equal(space.encode(config), code), f"encode(decode(code)) is another code: {config}"
    described = DescribedSpace(json.loads(json.dumps(space.description)))
    assert described.decode(code) == config, "a run folder, which has the description alone, spells it differently"


def _check_sides(space: ModelSpace, codes: Codes) -> None:
    first, second = space.split(codes)
    assert len(first) == len(second) == len(codes), "split gives another number of rows"
    formats = space.quantization(space.graph)
    assert isinstance(formats, FormatSpace), f"quantization gives a {type(formats).__name__}"
    formats.check(second)
    sides = np.concatenate([first, second], axis=1)
    assert len(_distinct(sides)) == len(_distinct(codes)), "two candidates have the same two sides"
    changed = any(space.widths(row) for row in first[:: max(1, len(first) // 32)])
    assert space.changes_widths or not changed, "changes_widths is false, and a candidate changes one"


def _check_formats(space: FormatSpace, code: Codes) -> None:
    config = space.decode(code)
    alone = single(space.graph, config)
    assert alone.size == 1, f"the candidate spelled out leaves a choice: {config}"
    expected = space.formats(space.options(code[None])[0])
    formats = alone.formats(np.zeros(len(alone.groups), dtype=np.int64))
    assert formats == expected, f"the candidate spelled out has other formats: {config}"


def _check_uniform(space: ModelSpace) -> None:
    codes = space.uniform()
    space.check(codes)
    assert np.array_equal(codes, space.canonical(codes)), "a uniform candidate is not canonical"
    assert len(_distinct(codes)) == len(codes), "uniform gives a candidate twice"
