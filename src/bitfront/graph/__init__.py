"""An nn.Module captured once: sites, shapes, operations. ``capture(model, sample)`` gives an immutable ``Graph``."""

from bitfront.graph.base import Graph, Node, Site
from bitfront.graph.capture import capture

__all__ = ["Graph", "Node", "Site", "capture"]
