"""Jet substructure classification: the small networks of LogicNets, of MASE's labs and of hls4ml's papers.

Every model here holds its layers in one ``nn.Sequential`` called ``seq_blocks``, so torch.fx names the sites
``seq_blocks_0``, ``seq_blocks_1`` ... after an input ``x``. Configurations and checkpoints written for MASE
therefore fit without changes. The models were published for 16 features and 5 classes; they take any dataset of
flat samples. All but ``jsc-mlp`` end in a ReLU before the cross entropy, as published; their checkpoints need it.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitfront.errors import ConfigError
from bitfront.models import MODELS


class JSCModel(nn.Module):
    """Layers applied one after the other: x (samples, features) → logits (samples, classes)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.seq_blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        logits: Tensor = self.seq_blocks(x)
        return logits


@MODELS.register("jsc-tiny", data="jsc")
def jsc_tiny(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """One linear layer, 16-5, between ReLUs: 117 parameters. The model of MASE's labs."""
    features = _flat_features("jsc-tiny", sample_shape)
    return JSCModel(nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, num_classes), nn.ReLU())


@MODELS.register("jsc-toy", data="jsc")
def jsc_toy(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Three linear layers, 16-8-8-5, each with batch norm and ReLU: 327 parameters."""
    return _toy("jsc-toy", sample_shape, num_classes)


@MODELS.register("jsc-new", data="jsc")
def jsc_new(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The layers of jsc-toy, under the name that users of MASE gave to a copy of it."""
    return _toy("jsc-new", sample_shape, num_classes)


def _toy(name: str, sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    features = _flat_features(name, sample_shape)
    return JSCModel(
        nn.BatchNorm1d(features),
        nn.ReLU(),
        *_linear_norm_relu(features, 8),
        *_linear_norm_relu(8, 8),
        *_linear_norm_relu(8, num_classes),
    )


@MODELS.register("jsc-s", data="jsc")
def jsc_s(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Five linear layers, 16-64-32-32-32-5, the smallest JSC network of LogicNets."""
    features = _flat_features("jsc-s", sample_shape)
    return JSCModel(
        nn.BatchNorm1d(features),
        nn.ReLU(),
        *_linear_norm_relu(features, 64),
        *(nn.Linear(64, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU()),
        *_linear_norm_relu(32, num_classes),
    )


@MODELS.register("jsc-three-linear-layers", data="jsc")
def jsc_three_linear_layers(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Three linear layers, 16-16-16-5, at seq_blocks_2, _4 and _6: the model of MASE's width-search lab."""
    features = _flat_features("jsc-three-linear-layers", sample_shape)
    return JSCModel(
        nn.BatchNorm1d(features),
        nn.ReLU(),
        *(nn.Linear(features, 16), nn.ReLU()),
        *(nn.Linear(16, 16), nn.ReLU()),
        *(nn.Linear(16, num_classes), nn.ReLU()),
    )


@MODELS.register("jsc-three-linears", data="jsc")
def jsc_three_linears(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Three linear layers, 16-16-16-5, one behind the other at seq_blocks_2, _3 and _4: that lab's other form."""
    features = _flat_features("jsc-three-linears", sample_shape)
    return JSCModel(
        nn.BatchNorm1d(features),
        nn.ReLU(),
        *(nn.Linear(features, 16), nn.Linear(16, 16), nn.Linear(16, num_classes)),
        nn.ReLU(),
    )


@MODELS.register("jsc-mlp", data="jsc")
def jsc_mlp(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Four linear layers, 16-64-32-32-5, ReLU between, none at the end: the network of the hls4ml papers."""
    features = _flat_features("jsc-mlp", sample_shape)
    return JSCModel(
        *(nn.Linear(features, 64), nn.ReLU()),
        *(nn.Linear(64, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, num_classes),
    )


def _linear_norm_relu(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()


def _flat_features(name: str, sample_shape: tuple[int, ...]) -> int:
    if len(sample_shape) != 1:
        raise ConfigError(
            f"model {name!r} takes flat samples, of shape (features,); the samples of this dataset have "
            f"shape {tuple(sample_shape)}. Choose a dataset of features, such as jsc, or a "
            "model for images, such as digits-mlp or digits-cnn.",
            key=("model",),
        )
    return sample_shape[0]
