"""(graph, formats) → a new nn.Module: what a user deploys or trains on. Nothing here changes a captured model."""

from bitfront.transforms.observe import calibrate
from bitfront.transforms.quantize import Quantizer, SiteFormats, quantize
from bitfront.transforms.widen import group_widths, multiplied, widen

__all__ = [
    "Quantizer",
    "SiteFormats",
    "calibrate",
    "group_widths",
    "multiplied",
    "quantize",
    "widen",
]
