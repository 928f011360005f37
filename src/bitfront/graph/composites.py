"""The transformers of torch.nn: looked into by the tracer, so that their layers, norms and attentions are nodes.

Their ``forward`` asks for the shapes and the place of tensors before it calls its layers: to take a fused kernel in
evaluation, to pack sequences that are padded, to see whether a mask is the usual one. A tracer has no shapes. So it
gets the same calls of the layers without these questions. Whether that gives the bits of the model is checked
afterwards, as for every trace (``graph/checking.py``).

A fused kernel only reads the parameters of its layers. In a captured model the layers are called instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.operations.lookup import hooks


def is_composite(module: nn.Module) -> bool:
    """Whether a module is a transformer of torch.nn, or one of its layers, that the tracer looks into."""
    return _forward_of(module) is not None or type(module) is nn.TransformerDecoderLayer


def without_questions(module: nn.Module) -> Callable[..., Any] | None:
    """What to trace in place of the ``forward`` of a composite; None where its own can be traced."""
    forward = _forward_of(module)
    return None if forward is None or hooks(module) else partial(forward, module)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Without torch's fused kernels for attention, which nothing can be traced through."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call_layers(model: nn.Module, run: Callable[[nn.Module], Tensor], expected: Tensor) -> Tensor:
    """Let the encoder layers of a model call their layers in evaluation too, and encoders compute padding like any
    other position. Where that changes the output by more than float error, everything stays as it is.

    Args:
        model: a private copy, in evaluation mode; it is changed.
        run: gives its output.
        expected: its output before.

    Returns:
        Its output afterwards.
    """
    #: Attributes that are read for nothing but the choice of the fused kernel, and of packing.
    names = (
        (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
        (nn.TransformerEncoder, "use_nested_tensor", False),
    )
    changed = [
        (module, name, vars(module)[name], value)
        for module in model.modules()
        for kind, name, value in names
        if isinstance(module, kind) and name in vars(module)
    ]
    if not changed:
        return expected
    for module, name, _, value in changed:
        setattr(module, name, value)
    called = run(model)
    if torch.allclose(called, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        return called
    for module, name, before, _ in changed:
        setattr(module, name, before)
    return expected


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    if "forward" in vars(module) or getattr(module, "use_nested_tensor", False):
        return None
    kind = type(module)
    return next((f for base, f in _FORWARDS.items() if issubclass(kind, base) and kind.forward is base.forward), None)


def _encoder_layer(
    self: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    dtype = _dtype(self)
    masks = (_added(src_mask, dtype), _added(src_key_padding_mask, dtype))
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


def _encoder(
    self: Any,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    dtype = _dtype(self)
    mask, padding = _added(mask, dtype), _added(src_key_padding_mask, dtype)
    causal = _is_causal(mask, is_causal)
    for layer in self.layers:
        src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
    return src if self.norm is None else self.norm(src)


def _decoder(
    self: Any,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    causal = _is_causal(tgt_mask, tgt_is_causal)
    for layer in self.layers:
        tgt = layer(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=causal,
            memory_is_causal=memory_is_causal,
        )
    return tgt if self.norm is None else self.norm(tgt)


def _transformer(
    self: Any,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _added(mask: Any, dtype: torch.dtype) -> Any:
    """A mask as what is added to scores, also one that is only known when the model runs."""
    if isinstance(mask, fx.Proxy):
        return mask.tracer.create_proxy("call_function", added_mask, (mask, dtype), {})
    return None if mask is None else added_mask(mask, dtype)


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, where true leaves out, as what is added to scores; another one as it is."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _is_causal(mask: Any, given: bool | None) -> bool:
    """Whether a mask lets each position see those before it alone, as far as torch looks for that."""
    if given is not None or not isinstance(mask, Tensor):
        return given is True
    square = nn.Transformer.generate_square_subsequent_mask(mask.size(-2), mask.device, mask.dtype)
    return mask.size() == square.size() and bool((mask == square).all())
