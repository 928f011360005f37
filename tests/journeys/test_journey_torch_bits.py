"""Learned bits of a network without compiled steps, as a user types it: plan, search, report, transform."""

import json
import os
import signal
import time

import pytest
from journey import PATIENCE

pytestmark = pytest.mark.journey

NETS = """
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.act, self.down = nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(self.act(self.up(self.norm2(x))))

class Transformer(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 8), Block(), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.block(self.embed(x.reshape(-1, 4, 4))).mean(1))

class Curved(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, classes)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(torch.sigmoid(self.fc1(x)))))

def transformer(sample_shape, num_classes):
    return Transformer(num_classes)

def curved(sample_shape, num_classes):
    return Curved(num_classes)
"""

FILE = """
model = "nets:{name}"
dataset = "npz"
dataset_path = "{data}"
project = "bits"
max_epochs = 3
batch_size = 64
learning_rate = 1e-2
accelerator = "cpu"
[search.strategy]
name = "learned_bits"
[search.strategy.setup]
cycles = 3
epochs = 2
networks = 2
batch_size = 128
learning_rate = 1e-2
"""


@pytest.mark.parametrize(
    ("name", "float_layer"),
    [
        ("transformer", "GELU: block.act; LayerNorm"),
        pytest.param("curved", "sigmoid: sigmoid; tanh: tanh", marks=pytest.mark.long),
    ],
)
def test_search_report_and_transform_give_the_same_numbers(name, float_layer, shell, data):
    shell.write("nets.py", NETS)
    shell.write("file.toml", FILE.format(name=name, data=data))
    plan = shell("plan", "file.toml")
    assert "trained by: torch, on cpu (no compiled steps: " in plan.out
    assert float_layer in " ".join((plan.out + plan.err).split())
    shell("search", "file.toml")
    shell("report", "runs/bits")
    best = json.loads((shell.folder / "runs/bits/best.json").read_text())
    assert best
    for entry in (best["0"], best[str(len(best) - 1)]):
        typed = shell("transform", "--run", "runs/bits", "--trial", entry["number"], "--check", "--json")
        rebuilt = json.loads(typed.out)
        assert rebuilt["accuracy"] == entry["software_metrics"]["accuracy"]
        assert rebuilt["loss"] == entry["software_metrics"]["loss"]
    page = (shell.folder / "runs/bits/report.html").read_text()
    assert ("fc3" if name == "curved" else "block.qkv") in page
    for entry in best.values():
        assert f"<td>{entry['hardware_metrics']['ebops']:,.0f}</td>" in page
        assert f"{entry['software_metrics']['accuracy']:.4g} <small>" in page


@pytest.mark.long
def test_killed_after_a_cycle_it_ends_with_the_same_bytes(shell, data):
    shell.write("nets.py", NETS)
    # More than a cycle is left when the process is killed.
    text = FILE.format(name="transformer", data=data).replace("epochs = 2\n", "epochs = 12\n")
    shell.write("whole.toml", text.replace('"bits"', '"whole"'))
    shell.write("killed.toml", text.replace('"bits"', '"killed"'))
    shell("search", "whole.toml")
    whole, killed = (shell.folder / "runs" / name for name in ("whole", "killed"))
    process = shell.start("search", "killed.toml")
    first, end = killed / "checkpoints" / "cycle-1.pt.json", time.monotonic() + PATIENCE
    while not first.exists():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end, "no cycle was complete"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "checkpoints" / "cycle-3.pt").exists()
    shell("search", "killed.toml")
    for name in ("best.json", *(f"checkpoints/cycle-{cycle}.pt" for cycle in (1, 2, 3))):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
