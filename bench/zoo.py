"""A searched front for each kind of network: what can be quantized, what a candidate costs, how much memory it takes.

Six networks with random weights, from the families that people put on small hardware: a BERT and a GPT-2 of Hugging
Face (which cannot be traced), a vision transformer, an LSTM for keywords, a U-Net and a DS-CNN. Labels are the answers
of the float model, so that its accuracy is 1 and every candidate shows what quantization changes. Each is searched in a
process of its own by ``evolution``, with affine formats (a scale per tensor of an input, per channel of a weight) of 4,
6 or 8 bits at every site that ``default`` means.

weights, macs   part of the values of all parameters, and of the multiply-accumulates, that belongs to a site
ms, forwards    a candidate: the whole search by its candidates; the same in eager float forward passes
peak MB         of the process, less what it took before the search

Some members of the front are evaluated again as deployed, by the search itself; a difference ends it with an error.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import parser, report, spread, timed
from torch import Tensor, nn

import bitfront as bf
from bitfront.graph import capture
from models import DsCnn, VisionTransformer, settled

CHOICES = {"name": ["affine"], "data_in_width": [4, 6, 8], "weight_width": [4, 6, 8]}
#: Answers that must be those of the float model for the column "bits".
ALIKE = 0.9


class Tokens(nn.Module):
    """A model of Hugging Face on whole numbers that come as floats; its answer at the first or the last token."""

    def __init__(self, model: nn.Module, width: int, classes: int, last: bool) -> None:
        super().__init__()
        self.model, self.last, self.head = model, last, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        states = self.model(input_ids=x.long()).last_hidden_state
        return self.head(states[:, -1] if self.last else states[:, 0])


class KeywordLstm(nn.Module):
    """Two LSTM layers over 40 frames of 40 coefficients."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(40, 64, num_layers=2, batch_first=True), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


def double(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions with batch norms."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels, with transposed convolutions; the answer is the class with the largest mean over the pixels."""

    def __init__(self, classes: int = 6, width: int = 16) -> None:
        super().__init__()
        w = width
        self.first, self.second, self.bottom = double(3, w), double(w, 2 * w), double(2 * w, 4 * w)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.right2, self.right1, self.out = double(4 * w, 2 * w), double(2 * w, w), nn.Conv2d(w, classes, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(self.pool(a))
        c = self.up2(self.bottom(self.pool(b)))
        c = self.up1(self.right2(torch.cat([b, c], 1)))
        return self.out(self.right1(torch.cat([a, c], 1))).mean((2, 3))


#: What is declared lives as long as the library object.
DECLARED: list[torch.library.Library] = []


def prepare_transformers() -> None:
    """Let transformers be imported where torchvision's wheel lacks the C extension that fits torch: it is not used."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)


def bert() -> nn.Module:
    """Four layers of width 128 on 32 tokens."""
    prepare_transformers()
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512
    )
    return Tokens(BertModel(config, add_pooling_layer=False), 128, 6, last=False)


def gpt2() -> nn.Module:
    """Four layers of width 128 on 32 tokens."""
    prepare_transformers()
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=128, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return Tokens(GPT2Model(config), 128, 6, last=True)


def tokens(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1000, (samples, 32), generator=generator).float()


def floats(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda samples, generator: torch.randn(samples, *shape, generator=generator)


#: Name → the model, its samples.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], Tensor]]] = {
    "BERT": (bert, tokens),
    "GPT-2": (gpt2, tokens),
    "ViT": (lambda: VisionTransformer(depth=6), floats(3, 32, 32)),
    "LSTM": (KeywordLstm, floats(40, 40)),
    "U-Net": (lambda: settled(UNet, (3, 32, 32)), floats(3, 32, 32)),
    "DS-CNN": (lambda: settled(DsCnn, (1, 49, 10)), floats(1, 49, 10)),
}


def shares(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Parts of the parameters' values and of the multiply-accumulates that belong to sites."""
    graph = capture(model, x[:2])
    named = dict(graph.model.named_parameters())
    held = {name for site in graph.sites for _, name in site.operand_parameters if name in named}
    held |= {name for site in graph.sites for name in site.computed_from if name in named}
    weights = sum(named[name].numel() for name in held) / sum(p.numel() for p in named.values())
    macs = sum(s.macs for s in graph.sites) / max(1, sum(n.macs for n in graph.nodes))
    return weights, macs


def balance(model: nn.Module, x: Tensor) -> None:
    """Change the last bias so that all classes have the same mean over `x`: random weights prefer one of them."""
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None][-1]
    with torch.no_grad():
        last.bias -= model(x).mean(0)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(name: str, samples: int, trials: int) -> dict[str, Any]:
    """The figures of one network."""
    torch.manual_seed(0)
    make, draw = ZOO[name]
    model = make().eval()
    generator = torch.Generator().manual_seed(0)
    x, others = draw(samples, generator), draw(512, generator)  # 512 have every class
    balance(model, others)
    with torch.no_grad():
        y, labels = model(x).argmax(1), model(others).argmax(1)
        forward = spread([timed(lambda: model(x)) for _ in range(7)][2:])["median"]
    weights, macs = shares(model, x)
    before = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        runs: list[bf.Run] = []
        seconds = timed(
            lambda: runs.append(
                bf.search(
                    model=model,
                    data={"train": (others, labels), "val": (x, y)},
                    space={"default": CHOICES},
                    metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
                    strategy="evolution",
                    n_trials=trials,
                    project_dir=folder,
                )
            )
        )
        (run,) = runs
        alike = [t.metrics["average_bitwidth"] for t in run.front if t.metrics["accuracy"] >= ALIKE]
        front = len(run.front)
    return {
        "network": name,
        "weights": weights,
        "macs": macs,
        "sites": len(capture(model, x[:2]).sites),
        "samples": samples,
        "candidates": trials,
        "front": front,
        f"bits at {ALIKE:.0%} alike": min(alike, default=None),
        "ms": 1e3 * seconds / trials,
        "forwards": seconds / trials / forward,
        "peak MB": peak_mb() - before,
    }


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    samples, trials = (16, 12) if options.quick else (128, 150)
    if options.one:
        print(json.dumps(one(options.one, samples, trials)))
        return 0
    rows = []
    for name in ["DS-CNN"] if options.quick else ZOO:
        command = [sys.executable, __file__, "--one", name, *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    summary = {f"{r['network']}_{k}": float(r[k]) for r in rows for k in ("weights", "macs", "forwards")}
    summary["least_share"] = float(np.min([r[k] for r in rows for k in ("weights", "macs")]))
    report("A front for each kind of network", rows, summary, options.json, data="random samples and weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
