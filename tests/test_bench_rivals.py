"""The rivals' files are read right and counted right, without any rival; and what does not install is said."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitfront.metrics.effective_bits import BitCount

RIVALS = Path(__file__).parents[1] / "bench" / "rivals"


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(f"rivals_{name}", RIVALS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def networks():
    yield loaded("integer_networks")
    sys.modules.pop("rivals_networks", None)


@pytest.fixture(scope="module")
def recount():
    """bench/rivals/recount.py as a module, with the neighbours that it has when it is run."""
    before = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(RIVALS)]
    yield loaded("recount")
    sys.path[:] = before[1]
    for name in {"common", "install", "integer_networks", "learned_bits", "rivals_recount"} - before[0]:
        sys.modules.pop(name, None)


def arrays(rng: np.random.Generator, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One network at random, as a rival's script writes it."""
    given: dict[str, np.ndarray] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        for name, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            widths = rng.integers(0, 5, shape)
            given[f"{name}_widths_{i}"], given[f"{name}_points_{i}"] = widths, rng.integers(-1, 5, shape)
            given[f"{name}_{i}"] = rng.integers(1 - 2**widths, 2**widths)
        given[f"input_widths_{i}"] = rng.integers(0, 6, inputs)
        given[f"input_points_{i}"] = rng.integers(-2, 4, inputs)
        given[f"input_signed_{i}"] = rng.integers(0, 2, inputs).astype(bool) & (i == 0)
    return given


def written(file: Path, given: list[dict[str, np.ndarray]], **changes: object) -> Path:
    record = {"rival": "X", "seed": 0, "rounding": "half up", "overflow": "wrap", **changes}
    record["networks"] = [{"epoch": n} for n in range(len(given))]
    stacked = {name: np.stack([one[name] for one in given]) for name in given[0]}
    np.savez(file, record=json.dumps(record), **stacked)
    return file


def by_hand(given: dict[str, np.ndarray], x: np.ndarray, depth: int, rounding: str, overflow: str) -> list[list[float]]:
    """Value by value; every number in it is a multiple of a power of two, so that Python's floats are exact."""
    rows = []
    for row in x.tolist():
        for i in range(depth):
            seen = []
            for j, value in enumerate(row):
                width, point = int(given[f"input_widths_{i}"][j]), int(given[f"input_points_{i}"][j])
                scaled = (max(value, 0.0) if i else value) * 2.0**point
                code = int(np.floor(scaled + 0.5)) if rounding == "half up" else round(scaled)
                low, high = (-(2**width) if given[f"input_signed_{i}"][j] else 0), 2**width - 1
                if overflow == "saturate":
                    code = min(max(code, low + 1 if low else 0), high)
                while code > high:
                    code -= high + 1 - low
                while code < low:
                    code += high + 1 - low
                seen.append(code / 2.0**point if width else 0.0)
            weight = given[f"weight_{i}"] / 2.0 ** given[f"weight_points_{i}"]
            bias = given[f"bias_{i}"] / 2.0 ** given[f"bias_points_{i}"]
            row = [sum(w * s for w, s in zip(ws, seen, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]
        rows.append(row)
    return rows


def span(code: int) -> int:
    return len(bin(abs(code))[2:].rstrip("0")) if code else 0


def counted(given: dict[str, np.ndarray], depth: int, signs: bool, spans: bool, trimmed: bool) -> int:
    """Product by product."""

    def bits(name: str) -> np.ndarray:
        codes = given[name]
        widths = given[name.replace("_", "_widths_")]
        each = [
            0 if not c else (span(c) if spans else int(abs(c)).bit_length() if trimmed else int(w)) + signs
            for c, w in zip(codes.reshape(-1).tolist(), widths.reshape(-1).tolist(), strict=True)
        ]
        return np.array(each).reshape(codes.shape)

    total = 0
    for i in range(depth):
        widths = given[f"input_widths_{i}"]
        seen = widths + (signs & given[f"input_signed_{i}"] & (widths > 0))
        total += sum(w * s for row in bits(f"weight_{i}").tolist() for w, s in zip(row, seen.tolist(), strict=True))
        total += int(bits(f"bias_{i}").sum())
    return total


@pytest.mark.parametrize("rounding", ["half up", "half to even"])
@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_file_gives_the_numbers_it_means(networks, rounding, overflow, seed, tmp_path):
    rng = np.random.default_rng(seed)
    given = [arrays(rng, (5, 4, 3)) for _ in range(2)]
    record, read = networks.read(written(tmp_path / "x.npz", given, rounding=rounding, overflow=overflow))
    assert record["rival"] == "X"
    assert [network.about["epoch"] for network in read] == [0, 1]
    # Quarters meet the middle between two codes, and are far beyond the ends.
    x = (rng.integers(-100, 101, (40, 5)) / 4).astype(np.float32)
    for network, one in zip(read, given, strict=True):
        expected = by_hand(one, x, 2, rounding, overflow)
        assert networks.outputs(network, x).tolist() == expected
        y = rng.integers(0, 3, 40)
        right = np.mean([row.index(max(row)) == label for row, label in zip(expected, y, strict=True)])
        assert networks.accuracy(network, x, y) == pytest.approx(right)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("count", ["width", "set_bits"])
@pytest.mark.parametrize("trimmed", [False, True])
def test_its_cost_is_the_count_of_its_products(networks, signs, count, trimmed, tmp_path):
    given = [arrays(np.random.default_rng(seed), (6, 5, 4, 3)) for seed in range(3)]
    _, read = networks.read(written(tmp_path / "x.npz", given))
    for network, one in zip(read, given, strict=True):
        expected = counted(one, 3, signs, count == "set_bits", trimmed)
        assert networks.ebops(network, BitCount(signs, count), trimmed=trimmed) == expected > 0


def test_the_count_of_a_rival_charges_quantizers_of_zeros(networks, tmp_path):
    parameters = {
        "weight": ([[0, 1]], [[3, 2]], [[0, 0]]),
        "bias": ([0], [4], [0]),
    }
    one = {
        f"{n}{part}_0": a for n, p in parameters.items() for part, a in zip(("", "_widths", "_points"), p, strict=True)
    }
    one |= {"input_widths_0": [5, 7], "input_points_0": [0, 0], "input_signed_0": [True, False]}
    _, (network,) = networks.read(written(tmp_path / "x.npz", [{k: np.array(v) for k, v in one.items()}]))
    assert networks.ebops_of_quantizers(network, signs=False) == 3 * 5 + 2 * 7 + 4
    assert networks.ebops_of_quantizers(network, signs=True) == 4 * 6 + 3 * 7 + 5
    assert networks.ebops(network, BitCount(), trimmed=False) == 2 * 7
    assert networks.ebops(network, BitCount()) == 7


def test_what_is_wrong_in_a_file_is_said(networks, tmp_path):
    good = arrays(np.random.default_rng(0), (3, 2))
    with pytest.raises(ValueError, match="overflow is 'other'; allowed: wrap, saturate"):
        networks.read(written(tmp_path / "a.npz", [good], overflow="other"))
    np.savez(tmp_path / "b.npz", **good)
    with pytest.raises(ValueError, match="has no record"):
        networks.read(tmp_path / "b.npz")
    missing = {name: array for name, array in good.items() if name != "bias_points_0"}
    with pytest.raises(ValueError, match=r"network 0 is not complete.*bias_points_0"):
        networks.read(written(tmp_path / "c.npz", [missing]))
    with pytest.raises(ValueError, match="a code of weight_0 needs more bits than its width"):
        networks.read(written(tmp_path / "d.npz", [{**good, "weight_0": good["weight_0"] + 99}]))
    with pytest.raises(ValueError, match="do not fit its weight of shape"):
        networks.read(written(tmp_path / "e.npz", [{**good, "input_signed_0": np.zeros(4, dtype=bool)}]))


def test_sums_that_would_not_be_exact_are_refused(networks, tmp_path):
    given = arrays(np.random.default_rng(0), (3, 2))
    given |= {"weight_0": given["weight_0"] * 0 + 1, "weight_widths_0": given["weight_widths_0"] * 0 + 1}
    given |= {"input_widths_0": np.full(3, 40), "weight_points_0": np.array([[0, 12, 0], [0, 0, 0]])}
    _, (network,) = networks.read(written(tmp_path / "x.npz", [given], overflow="saturate"))
    with pytest.raises(ValueError, match="a sum of layer 0 has more than 50 bits"):
        networks.outputs(network, np.full((1, 3), 1e12, dtype=np.float32))


def test_only_what_nothing_dominates_is_a_front(networks):
    assert networks.non_dominated([(3, 0.8), (1, 0.5), (2, 0.5), (2, 0.6), (4, 0.8), (1, 0.4)]) == [1, 3, 0]
    assert networks.non_dominated([]) == []


def test_fronts_are_chosen_on_val_by_each_count_and_compared_on_test(recount):
    def front(name: str, *networks: tuple[float, float, float, float]):
        # Costs by the default count and with signs; accuracies on val and test.
        some = [recount.Counted(None, {"": c, "_signs": s}, v, t) for c, s, v, t in networks]
        return recount.Front(name, name, 0, 1.0, 1.0, some)

    one = front("one", (2000, 4000, 0.75, 0.76), (3000, 3900, 0.76, 0.75), (4000, 9000, 0.75, 0.99))
    assert one.points() == [(2000, 0.76), (3000, 0.75)]
    assert one.points("_signs") == [(3900, 0.75)]
    assert one.points(cheapest=2500) == [(3000, 0.75)]
    rival = front("rival", (1000, 1, 0.7, 0.9), (2500, 1, 0.74, 0.74), (3500, 1, 0.77, 0.77), (60_000, 1, 0.8, 0.9))
    # What is below 1,700 or above 50,000 EBOPs is not compared.
    assert recount.above(one, rival) == 50
    assert recount.summary_of([one, rival])["one_volume"] == pytest.approx(0.06 * np.log10(50))


@pytest.mark.long
@pytest.mark.slow
def test_what_does_not_install_is_said_with_the_last_lines_of_pip(tmp_path):
    """No index is asked, so it needs no network."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "nobody.txt").write_text("this-cannot-exist==99.0\n")
    (lists / "nothing.txt").write_text("# nothing at all\n")
    command = [sys.executable, RIVALS / "install.py", "--lists", lists, "--envs", tmp_path / "envs", "--pip=--no-index"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1, done.stderr
    assert "nobody: does not install. The last lines of pip:" in done.stdout
    assert "No matching distribution found for this-cannot-exist==99.0" in done.stdout
    assert f"nothing: installed in {tmp_path / 'envs' / 'nothing'}" in done.stdout
    install = loaded("install")
    assert install.installed("nothing", lists, tmp_path / "envs")
    assert not install.installed("nobody", lists, tmp_path / "envs")
    assert install.install("nothing", lists, tmp_path / "envs") is None
    (lists / "nothing.txt").write_text("# something else\n")
    assert not install.installed("nothing", lists, tmp_path / "envs")


def test_a_rival_without_a_list_is_an_error():
    command = [sys.executable, RIVALS / "install.py", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nobody.txt; there are lists of hgq2, pquantml" in done.stdout
