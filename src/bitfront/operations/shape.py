"""What moves data and computes nothing: other shapes, parts, joins, copies, padding; and what is the identity in
evaluation."""

from __future__ import annotations

from torch import nn

from bitfront.operations.base import Merge, classes, define, free

IDENTITY = define(
    "identity",
    "Gives back what it is given: Identity, and dropout in evaluation.",
    modules=classes("Identity Dropout Dropout1d Dropout2d"),
    names=("identity",),
    count=free,
    view=True,
    merge=Merge("identity"),
)
DROPOUT = define(
    "dropout",
    "Dropout of other kinds, the identity in evaluation.",
    modules=classes("Dropout3d AlphaDropout FeatureAlphaDropout"),
    names=tuple("dropout dropout1d dropout2d dropout3d alpha_dropout stochastic_depth".split()),
    count=free,
)
FLATTEN = define(
    "flatten",
    "Several dimensions as one.",
    modules=(nn.Flatten,),
    names=("flatten",),
    count=free,
    view=True,
    merge=Merge("flatten"),
)
VIEW = define(
    "view",
    "The same values in another shape.",
    modules=(nn.Unflatten,),
    names=tuple("view reshape permute transpose contiguous squeeze unsqueeze".split()),
    count=free,
    view=True,
)
CONCATENATION = define(
    "concatenation",
    "Tensors joined along a dimension.",
    names=tuple("cat concat concatenate stack hstack vstack".split()),
    count=free,
)
PADDING = define(
    "padding",
    "Values around the edges.",
    modules=classes(
        "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d "
        "ReflectionPad3d CircularPad1d CircularPad2d CircularPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d"
    ),
    names=("pad",),
    count=free,
)
MOVE = define(
    "move",
    "Parts, repeats, orders, copies and new tensors: data is moved, nothing is computed.",
    modules=classes("PixelShuffle PixelUnshuffle ChannelShuffle Unfold"),
    names=tuple(
        """
        chunk split int bool double bfloat16 alias narrow select index_select gather take take_along_dim tile repeat
        hsplit vsplit meshgrid broadcast_to broadcast_tensors split_with_sizes getitem getattr get size expand
        expand_as movedim moveaxis swapaxes swapdims unbind clone detach to float type type_as half long
        repeat_interleave roll flip unfold im2col t unflatten view_as reshape_as tensor_split one_hot pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle arange zeros ones full empty eye linspace tensor
        as_tensor zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor randn
        rand_like randn_like copy fill zero setitem requires_grad cpu cuda as_strided diagonal tril triu real imag
        scatter index_put masked_select nonzero lift_fresh set_data data
        """.split()
    ),
    count=free,
)
