"""Random small classifiers with everything that people write in a model: their plans, networks, samples and spaces.

``plans()`` is a hypothesis strategy; ``network(plan)`` builds the network of a plan, with weights that follow from it.
"""

import contextlib

import torch
from hypothesis import strategies as st
from torch import nn

from random_blocks import BLOCKS as LAYERS
from random_customs import CUSTOMS
from random_parts import PARTS

CLASSES = 3
FEATURES = 6
SHAPES = {"vector": (FEATURES,), "image": (2, 6, 6), "sequence": (4, FEATURES), "tokens": (4,)}
BLOCKS = (*LAYERS, *PARTS, *CUSTOMS)
#: Operation → its operands.
OPERANDS = {
    "linear": ("data_in", "weight", "bias"),
    "conv1d": ("data_in", "weight", "bias"),
    "conv2d": ("data_in", "weight", "bias"),
    "relu": ("data_in",),
    "add": ("data_in", "data_in_2"),
    "sub": ("data_in", "data_in_2"),
    "mul": ("data_in", "data_in_2"),
    "matmul": ("data_in", "weight"),
    **dict.fromkeys(("bmm", "mm", "einsum"), ("data_in", "weight")),
    **dict.fromkeys(("addmm", "baddbmm"), ("data_in", "weight", "bias")),
    **dict.fromkeys(("embedding", "embedding_bag"), ("weight",)),
}


class RandomModel(nn.Module):
    """The blocks of a plan, one after the other, and a layer to the classes."""

    def __init__(self, plan):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(plan["seed"])
            self.image, tokens = plan["input"] == "image", plan["input"] == "tokens"
            shape = SHAPES["sequence" if tokens else plan["input"]]
            self.embed = nn.Embedding(10, FEATURES) if tokens else nn.Identity()
            self.blocks = nn.ModuleList(BLOCKS[kind](shape, n) for kind, n in plan["blocks"])
            size = int(torch.tensor(shape).prod())
            self.head = nn.Linear(shape[0] if self.image else size, CLASSES)

    def body(self, x):
        x = self.embed(x.long()) if isinstance(self.embed, nn.Embedding) else x
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)) if self.image else x.flatten(1))


class Bare(RandomModel):
    def forward(self, x):
        return self.body(x)


class Temperature(RandomModel):
    def forward(self, x, temperature=2.0):
        return self.body(x) / temperature


class OptionalMask(RandomModel):
    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return self.body(x)


class Star(RandomModel):
    def forward(self, *inputs):
        return self.body(inputs[0])


class Keywords(RandomModel):
    def forward(self, x, *, gain=1.5, **others):
        return self.body(x) * gain + len(others)


class Decorated(RandomModel):
    @torch.no_grad()
    def forward(self, x: "torch.Tensor", shift=torch.zeros(CLASSES)) -> "torch.Tensor":  # noqa: B008
        return self.body(x) + shift


class Called(RandomModel):
    """Does more when it is called than its forward."""

    def forward(self, x):
        return self.body(x)

    def __call__(self, x):
        return super().__call__(x) * 0.5


class HookedModel(RandomModel):
    def __init__(self, plan):
        super().__init__(plan)
        self.register_forward_hook(_shift)

    def forward(self, x):
        return self.body(x)


def _shift(_module, _inputs, out):
    return out + torch.tensor([0.5, 0.0, -0.5])


SIGNATURES = (Bare, Bare, Bare, Temperature, OptionalMask, Star, Keywords, Decorated, Called, HookedModel)


def _halve_layers(module, inputs):
    return (inputs[0] * 0.5,) if isinstance(module, nn.Linear | nn.Conv2d) else None


def _bend_layers(module, _inputs, out):
    return torch.sin(out) if isinstance(module, nn.Linear | nn.Conv2d) else None


@contextlib.contextmanager
def hooked(plan):
    """With the hooks of a plan, which torch runs around every module."""
    register = {
        "forward": (nn.modules.module.register_module_forward_hook, _bend_layers),
        "pre": (nn.modules.module.register_module_forward_pre_hook, _halve_layers),
    }
    handles = [add(hook) for add, hook in [register[plan["hooks"]]]] if plan["hooks"] else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@st.composite
def plans(draw):
    """What a network is made of: plain data."""
    blocks = st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(0, 23))
    sites = st.sampled_from([o for o in OPERANDS if o not in ("linear", "conv2d")])
    chosen = draw(st.lists(blocks, min_size=1, max_size=4))
    # What only this process knows cannot be sent to another one.
    alone = any(BLOCKS[kind].__name__ in ("Replaced", "Closed", "Overridden") for kind, _ in chosen)
    return {
        "input": draw(st.sampled_from([*SHAPES])),
        "blocks": chosen,
        "signature": draw(st.integers(0, len(SIGNATURES) - 1)),
        "hooks": draw(st.sampled_from([*[""] * 18, "forward", "pre"])),
        "seed": draw(st.integers(0, 999)),
        "format": draw(st.sampled_from(["integer", "affine"])),
        "widths": draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3, unique=True)),
        "operands": draw(
            st.sampled_from([("data_in", "weight", "bias"), ("data_in", "weight"), ("weight",), ("data_in",)])
        ),
        "sites": ("linear", "conv2d", *draw(st.lists(sites, max_size=4, unique=True))),
        "by": draw(st.sampled_from(["type", "type", "name"])),
        "train": draw(st.sampled_from([False, False, False, True])),
        "jobs": 1 if alone else draw(st.sampled_from([*[1] * 30, 2])),
    }


def network(plan):
    """The model of a plan, in evaluation mode."""
    return SIGNATURES[plan["signature"]](plan).eval()


def samples(plan, count=90):
    """Splits of random data for the model of a plan."""
    generator = torch.Generator().manual_seed(plan["seed"])
    shape = SHAPES[plan["input"]]
    x = 1.5 * torch.randn(count, *shape, generator=generator)
    if plan["input"] == "tokens":
        x = torch.randint(10, (count, *shape), generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    y[:CLASSES] = y[30 : 30 + CLASSES] = y[60 : 60 + CLASSES] = torch.arange(CLASSES)
    return {"train": (x[:30], y[:30]), "val": (x[30:60], y[30:60]), "test": (x[60:], y[60:])}


def choices(plan, sites):
    """The search space of a plan.

    Args:
        sites: (name, operation) of the sites of its model.
    """
    if plan["by"] == "name":
        keys = {name: op for name, op in sites if op in plan["sites"]}
        keys = dict(list(keys.items())[:: 1 + plan["seed"] % 2])
    else:
        keys = {op: op for op in plan["sites"]}
    return {"by": plan["by"], **{key: _table(plan, op) for key, op in keys.items()}}


def _table(plan, op):
    table = {"name": plan["format"]}
    weighted = op in ("linear", "conv1d", "conv2d")
    operands = [o for o in OPERANDS[op] if o in plan["operands"]] if weighted else OPERANDS[op]
    for operand in operands:
        if operand == "data_in_2" and plan["seed"] % 2:
            continue
        table[f"{operand}_width"] = plan["widths"]
        if plan["format"] == "integer":
            table[f"{operand}_frac_width"] = "auto"
    return table
