"""A searched front for each kind of network: what can be quantized, what a candidate costs, how much memory it takes.
And which of 23 common networks are written as ONNX.

**Searched.** Six networks with random weights, from the families that people put on small hardware: a BERT and a GPT-2
of Hugging Face (which cannot be traced), a vision transformer, an LSTM for keywords, a U-Net and a DS-CNN. Labels are
the answers of the float model, so that its accuracy is 1 and every candidate shows what quantization changes. Each is
searched in a process of its own by ``evolution``, with affine formats (a scale per tensor of an input, per channel of a
weight) of 4, 6 or 8 bits at every site that ``default`` means.

weights, macs   part of the values of all parameters, and of the multiply-accumulates, that belongs to a site
ms, forwards    a candidate: the whole search by its candidates; the same in eager float forward passes
peak MB         of the process, less what it took before the search

Some members of the front are evaluated again as deployed, by the search itself; a difference ends it with an error.

**Exported.** Networks of torchvision, timm and torch with random weights, written as ONNX in float, and with weights,
inputs and the values within an attention in affine formats of 8 bits (a scale per channel of a weight, per tensor
elsewhere), calibrated on the samples. ONNX Runtime's default session computes ``SAMPLES`` samples, and one alone.

float, int8        whether it is written and runs; otherwise the reason
by torch.onnx      functions and classes without a rule of Bitfront, which torch.onnx writes
float off, int8 off  the largest difference of an output from the float, or the deployed, network, by the largest output
equal, answers     samples of the int8 network that are equal in every bit; whose largest output is the same one
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, parser, report, spread, timed
from torch import Tensor, nn

import bitfront as bf
from bitfront.errors import ExportError
from bitfront.exporters.borrowed import BY_TORCH
from bitfront.exporters.onnx import INPUT, onnx_model
from bitfront.formats import FORMATS
from bitfront.formats.base import Format
from bitfront.graph import Graph, capture
from bitfront.transforms import calibrate, quantize
from models import DsCnn, VisionTransformer, settled

CHOICES = {"name": ["affine"], "data_in_width": [4, 6, 8], "weight_width": [4, 6, 8]}
#: Names of the two tables.
SEARCHED, WRITTEN = "searched", "exported"
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


#: Of the table of exported networks.
SAMPLES = 8


class LstmClassifier(nn.Module):
    """Two LSTM layers in both directions, its last state as features."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 48, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(96, 12)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


class TransformerClassifier(nn.Module):
    """Torch's encoder on frames of 40 coefficients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(40, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def autoencoder() -> nn.Module:
    """Strided convolutions, then transposed ones."""
    down = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2), nn.Sigmoid()]
    return nn.Sequential(*down, *up)


def of_torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        prepare_transformers()
        import torchvision

        return getattr(torchvision.models, name)(weights=None, **settings)

    return make


def of_timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        prepare_transformers()
        import timm

        return timm.create_model(name, pretrained=False)

    return make


#: Name → the network, the shape of a sample: as small as the network takes it.
EXPORTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        name: (of_torchvision(name), (3, 64, 64))
        for name in (
            "resnet18 resnet50 mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 squeezenet1_1 "
            "shufflenet_v2_x1_0 mnasnet1_0 regnet_y_400mf convnext_tiny swin_t"
        ).split()
    },
    "vit_b_16": (of_torchvision("vit_b_16", image_size=64), (3, 64, 64)),
    "googlenet": (of_torchvision("googlenet", aux_logits=False, init_weights=False), (3, 64, 64)),
    "inception_v3": (of_torchvision("inception_v3", aux_logits=False, init_weights=False), (3, 96, 96)),
    "alexnet": (of_torchvision("alexnet"), (3, 224, 224)),
    "vgg11": (of_torchvision("vgg11"), (3, 224, 224)),
    "timm mobilenetv3_small_100": (of_timm("mobilenetv3_small_100"), (3, 64, 64)),
    "timm efficientnet_lite0": (of_timm("efficientnet_lite0"), (3, 64, 64)),
    "timm deit_tiny_patch16_224": (of_timm("deit_tiny_patch16_224"), (3, 224, 224)),
    "LSTM classifier": (LstmClassifier, (20, 40)),
    "TransformerEncoder classifier": (TransformerClassifier, (20, 40)),
    "ConvTranspose autoencoder": (autoencoder, (3, 32, 32)),
}


def in_use(model: nn.Module, x: Tensor) -> nn.Module:
    """The network, no weight all zeros as the heads of some are, with statistics that belong to its weights."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = None
    with torch.no_grad():
        model(x)
    return model.eval()


def bytes_for(graph: Graph, x: Tensor) -> dict[str, dict[str, Format]]:
    """Affine formats of 8 bits for the weights and the inputs of all sites, and what takes the format of an input."""
    formats: dict[str, dict[str, Format]] = {}
    for site in graph.sites:
        chosen = {}
        for spec in site.specs:
            if spec.role in ("weight", "activation") or "data_in" in spec.format_of:
                kind = spec.kind(from_samples=site.flows(spec.name))
                held = spec.role == "weight" and not site.flows(spec.name)
                settings = {"width": 8, "granularity": "channel" if held else "tensor", "symmetric": held}
                chosen[spec.name] = FORMATS.get("affine").parse(settings, kind)
        formats[site.name] = chosen
    return calibrate(graph, formats, x)


def in_runtime(model: Any, x: Tensor) -> Tensor:
    """What ONNX Runtime's default session computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def compared(graph: Graph, formats: dict[str, dict[str, Format]], x: Tensor) -> dict[str, Any]:
    """How an ONNX file of a network in formats differs from the deployed network; or why there is none."""
    try:
        model = onnx_model(graph, formats)
    except ExportError as error:
        return {"runs": str(error), "off": "", "equal": "", "answers": "", "torch": ""}
    with torch.no_grad():
        expected = quantize(graph, formats)(x)
    computed, alone = in_runtime(model, x), in_runtime(model, x[:1])
    largest = float(expected.abs().max())
    rows = [t.reshape(len(x), -1) for t in (computed, expected)]
    return {
        "runs": "yes",
        "off": max(float((computed - expected).abs().max()), float((alone - expected[:1]).abs().max())) / largest,
        "equal": int((rows[0] == rows[1]).all(1).sum()),
        "answers": int((rows[0].argmax(1) == rows[1].argmax(1)).sum()),
        "torch": ", ".join(entry.value for entry in model.metadata_props if entry.key == BY_TORCH),
    }


def exported(name: str) -> dict[str, Any]:
    """The row of one network in the table of exported ones."""
    torch.manual_seed(0)
    make, shape = EXPORTED[name]
    x = torch.randn(SAMPLES, *shape)
    graph = capture(in_use(make(), x), x[:2])
    in_float, in_bytes = compared(graph, {}, x), compared(graph, bytes_for(graph, x), x)
    return {
        "network": name,
        "float": in_float["runs"],
        "int8": in_bytes["runs"],
        "by torch.onnx": in_float["torch"],
        "float off": in_float["off"],
        "int8 off": in_bytes["off"],
        "equal": in_bytes["equal"],
        "answers": in_bytes["answers"],
        "of": SAMPLES,
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


def in_tables(tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of several tables with the columns of all of them; the empty ones are left out of the page."""
    columns = dict.fromkeys(c for rows in tables.values() for row in rows for c in row)
    return [{"table": t, **{c: row.get(c, "") for c in columns}} for t, rows in tables.items() for row in rows]


def earlier(file: Path | None, table: str) -> tuple[list[Row], str]:
    """(the rows of a table that an earlier run has stored, the commit that it ran on)."""
    if file is None or not file.is_file():
        return [], ""
    stored = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        {k: v for k, v in row.items() if k != "table"} for row in stored["rows"] if row.get("table", table) == table
    ]
    said = re.search(rf"{table} on commit ([^;]+)", stored["machine"].get("data", ""))
    return rows, said[1] if said else str(stored["machine"]["commit"])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", choices=(SEARCHED, WRITTEN), help="one table; of the other, what the file has")
    arguments.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    samples, trials = (16, 12) if options.quick else (128, 150)
    if options.one:
        row = exported(options.one) if options.only == WRITTEN else one(options.one, samples, trials)
        print(json.dumps(row))
        return 0
    quick = {SEARCHED: ["DS-CNN"], WRITTEN: ["LSTM classifier"]}
    tables: dict[str, list[Row]] = {}
    data = "random samples and weights"
    for table, networks in ((SEARCHED, ZOO), (WRITTEN, EXPORTED)):
        if options.only not in (None, table):
            tables[table], commit = earlier(options.json, table)
            data += f"; {table} on commit {commit}" if tables[table] else ""
            continue
        tables[table] = []
        for name in quick[table] if options.quick else networks:
            more = ["--quick"] if options.quick else []
            command = [sys.executable, __file__, "--one", name, "--only", table, *more]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return 1
            tables[table].append(json.loads(done.stdout.splitlines()[-1]))
    report("Networks of every kind", in_tables(tables), summed(tables), options.json, data=data)
    return 0


def summed(tables: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The numbers that are compared with targets."""
    searched, written = tables[SEARCHED], tables[WRITTEN]
    summary = {f"{r['network']}_{k}": float(r[k]) for r in searched for k in ("weights", "macs", "forwards")}
    if searched:
        summary["least_share"] = float(np.min([r[k] for r in searched for k in ("weights", "macs")]))
    if written:
        summary |= {f"{way}_exported": float(sum(r[way] == "yes" for r in written)) for way in ("float", "int8")}
        summary["largest_off"] = max(float(r["float off"]) for r in written if r["float off"] != "")
    return summary


if __name__ == "__main__":
    sys.exit(main())
