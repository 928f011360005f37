"""An nn.Module captured once: sites, shapes, operations. ``capture(model, sample)`` gives an immutable ``Graph``."""

from bitfront.graph.base import Graph, Node, Site
from bitfront.graph.capture import capture
from bitfront.graph.channels import Channels, channels

__all__ = ["Channels", "Graph", "Node", "Site", "capture", "channels"]
