"""Counters on machines that have them, do not have them, or hide them; and what follows from their readings."""

import types

import numpy as np
import pytest
from test_metrics import evaluator

from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS, power
from bitfront.metrics.energy import Clocks, Energy, EnergySettings, metered
from bitfront.metrics.power import Estimated, NoCounterError, Nvml, Rapl, counter
from bitfront.testing.metrics import check_runner

#: A bias is added as float in any case.
FLOAT = {"name": ["integer"], "bias_width": [8]}


def package(root, number, energy, largest=999_999):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder / "energy_uj"


# --- RAPL ------------------------------------------------------------------------------------------------------------


def test_rapl_adds_up_packages_and_not_their_parts(tmp_path):
    first, second = package(tmp_path, 0, 100), package(tmp_path, 1, 0)
    part = package(tmp_path, "0:0", 0)
    rapl = Rapl(tmp_path)
    assert rapl.read() == 0
    first.write_text("600100")
    second.write_text("400000")
    part.write_text("999")
    assert rapl.read() == 1.0
    assert rapl.read() == 1.0
    assert rapl.gpu_utilization() == 0


def test_rapl_wraps_around(tmp_path):
    energy = package(tmp_path, 0, 999_990)
    rapl = Rapl(tmp_path)
    energy.write_text("9")  # 999,990 … 999,999 are 9 steps, 0 is the tenth, and 9 more
    assert rapl.read() == pytest.approx(19e-6)
    for now, total in ((500_000, 500_010), (499_999, 1_500_009)):
        energy.write_text(str(now))
        assert rapl.read() == pytest.approx(total * 1e-6)


def test_rapl_says_why_it_cannot_be_read(tmp_path):
    with pytest.raises(NoCounterError, match="has no intel-rapl"):
        Rapl(tmp_path)
    with pytest.raises(NoCounterError, match="has no intel-rapl"):
        Rapl(tmp_path / "nowhere")
    package(tmp_path, 0, "")
    with pytest.raises(NoCounterError, match=r"cannot be read \(ValueError"):
        Rapl(tmp_path)


def test_rapl_that_only_root_may_read(tmp_path, monkeypatch):
    package(tmp_path, 0, 5)

    def refuse(self, path):
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr(Rapl, "_number", refuse)
    with pytest.raises(NoCounterError, match=r"max_energy_range_uj cannot be read \(PermissionError"):
        Rapl(tmp_path)


# --- NVML ------------------------------------------------------------------------------------------------------------


class FakeError(Exception):
    pass


def fake_nvml(millijoules, missing=False):
    readings = iter(millijoules)

    def handle(uuid):
        if missing:
            raise FakeError("Not Found")
        return uuid

    def total(handle):
        assert handle == "GPU-abc"
        return next(readings)

    return types.SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=total,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=37),
    )


def test_nvml_counts_in_millijoules():
    gpu = Nvml("abc", fake_nvml([1, 1500, 4000]))
    assert (gpu.read(), gpu.read()) == (1.5, 4.0)
    assert gpu.gpu_utilization() == 0.37


def test_nvml_without_the_gpu():
    with pytest.raises(NoCounterError, match="NVML: Not Found"):
        Nvml("abc", fake_nvml([], missing=True))


# --- which one -------------------------------------------------------------------------------------------------------


def test_the_counter_of_what_computes(tmp_path, monkeypatch):
    meter, why = counter("auto", "cpu", 15, powercap=tmp_path)
    assert isinstance(meter, Estimated)
    assert "has no intel-rapl" in why
    package(tmp_path, 0, 5)
    assert isinstance(counter("auto", "cpu", 15, powercap=tmp_path)[0], Rapl)
    assert isinstance(counter("rapl", "cpu", 15, powercap=tmp_path)[0], Rapl)
    assert isinstance(counter("estimated", "cpu", 15, powercap=tmp_path)[0], Estimated)
    with pytest.raises(NoCounterError, match="runs on cpu"):
        counter("nvml", "cpu", 15, powercap=tmp_path)
    with pytest.raises(NoCounterError, match="runs on cuda"):
        counter("rapl", "cuda", 15, powercap=tmp_path)
    monkeypatch.setattr(power.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    assert isinstance(counter("auto", "cuda", 15, nvml=fake_nvml([1]))[0], Nvml)


def test_a_counter_asked_for_by_name_is_not_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(power.Rapl.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(power.counter, "__kwdefaults__", {"powercap": tmp_path, "nvml": None})
    with pytest.raises(ConfigError, match=r"has no intel-rapl.*source = 'auto' estimates") as caught:
        Energy(EnergySettings(source="rapl")).ready("cpu")
    assert caught.value.key == ("source",)
    Energy(EnergySettings()).ready("cpu")


# --- windows ---------------------------------------------------------------------------------------------------------


class Machine:
    """A clock, a processor and a counter that go on only when something runs or waits: 20 W idle, 50 W at work."""

    source = "rapl"

    def __init__(self):
        self.now, self.joules, self.used = 100.0, 7.0, 3.0

    def spend(self, seconds, watts, busy):
        self.now += seconds
        self.joules += seconds * watts
        self.used += busy

    def clocks(self):
        return Clocks(lambda: self.now, lambda: self.used, lambda s: self.spend(s, 20.0, 0.0))

    def read(self):
        return self.joules

    def gpu_utilization(self):
        return 0.0


def test_a_window_by_a_fake_clock():
    machine = Machine()
    idle = metered(machine, 2.0, None, machine.clocks())
    assert (idle.seconds, idle.joules, idle.busy, idle.runs) == (2.0, 40.0, 0.0, 0)
    work = metered(machine, 2.0, lambda: machine.spend(0.5, 50.0, 0.25), machine.clocks())
    assert (work.seconds, work.joules, work.busy, work.runs) == (2.0, 100.0, 1.0, 4)
    once = metered(machine, 0.1, lambda: machine.spend(3.0, 50.0, 0.0), machine.clocks())
    assert (once.seconds, once.runs) == (3.0, 1)


def test_energy_above_idle_by_a_fake_clock(tiny_mlp, monkeypatch):
    machine = Machine()
    monkeypatch.setattr("bitfront.metrics.energy.os.cpu_count", lambda: 4)
    context = evaluator(tiny_mlp, (4,), {"default": FLOAT})
    runner = Energy(EnergySettings(window=2.0, batch_size=5), machine, machine.clocks())
    original = type(runner._prepared(context)[0]).network

    def network(*args):
        deployed = original(*args)
        return type(deployed)(lambda: machine.spend(0.5, 50.0, 0.25), lambda: 1.0)

    monkeypatch.setattr("bitfront.metrics.energy.Deployment.network", network)
    metrics = runner.measure(context, context.space.numbered(0, 1))
    # 100 J in 2 s less 40 J idle, in 4 runs of 5 samples.
    assert {k: v.tolist() for k, v in metrics.items()} == {
        "energy": [60 / 20 * 1e3],
        "power": [30.0],
        "idle_power": [20.0],
        "cpu_utilization": [0.5 / 4],
        "gpu_utilization": [0.0],
    }
    kinds = runner.kinds(context)
    assert kinds["energy"] == ("measured", "")
    assert kinds["gpu_utilization"] == ("estimated", "the network uses no GPU")
    before = machine.now
    runner.measure(context, context.space.numbered(0, 1))
    assert machine.now == before


def test_without_a_counter_it_is_an_estimate_and_says_so(tiny_mlp):
    context = evaluator(tiny_mlp, (4,), {"default": FLOAT})
    runner = Energy(EnergySettings(window=0.05, tdp=30.0, source="estimated"))
    kind, why = runner.kinds(context)["energy"]
    assert kind == "estimated"
    assert why == "share of the processors' time × 30 W: source = 'estimated'"
    assert runner.kinds(context)["cpu_utilization"] == ("measured", "")
    metrics = {k: v[0] for k, v in runner.measure(context, context.space.numbered(0, 1)).items()}
    assert metrics["idle_power"] == 0
    assert metrics["power"] == pytest.approx(30 * metrics["cpu_utilization"], rel=0.2)
    assert 0 < metrics["cpu_utilization"] <= 1
    assert metrics["energy"] > 0


def test_where_nothing_can_be_run_it_is_the_modelled_latency_times_watts(tiny_mlp):
    seed = {"fc1": {"name": ["integer"], "data_in_width": [16], "weight_width": [4, 16]}}
    context = evaluator(tiny_mlp, (4,), seed)
    codes = context.space.numbered(0, 2)
    runner = Energy(EnergySettings(tdp=10.0, batch_size=2))
    kind, why = runner.kinds(context)["energy"]
    assert kind == "estimated"
    assert why.startswith("modelled latency × 10 W, the processor fully busy: fc1 (Linear): data_in is int16.8")
    latency = RUNNERS.get("latency")
    seconds = latency(latency.Settings(batch_size=2)).measure(context, codes)["latency"] / 1e3
    assert np.allclose(runner.measure(context, codes)["energy"], seconds * 10 / 2 * 1e3)


def test_the_estimated_energy_conforms(tiny_mlp):
    context = evaluator(
        tiny_mlp, (4,), {"default": {"name": ["integer"], "data_in_width": [4, 8], "weight_width": [4, 8]}}
    )
    settings = {"backend": "modelled", "source": "estimated"}
    check_runner("energy", settings, context, context.space.sample(12, np.random.default_rng(0)))
