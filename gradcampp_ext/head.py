"""The head whose gradients need no backward pass: a mean over space, then one linear layer.

There the derivative of class k by channel c is weight[k, c] / positions at every position. The
head is recognised by the graph that autograd recorded from the layer to the output, in which no
operation can hide; so the answer is autograd's own, whatever the modules are called.
"""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

# Operations between mean and linear layer that rename positions of one tensor and change nothing.
_RESHAPING = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward")


def gradients(
    output: Tensor, edge: GradientEdge, shape: Sequence[int], classes: Tensor
) -> Tensor | None:
    """Derivatives of classes by a layer's activations, if the head allows it.

    Args:
        output: [N, classes], with its graph.
        edge: where the layer's activations enter the graph.
        shape: of the activations, [N, ...].
        classes: [N, K].
    Returns: [N, K, *shape[1:]], expanded from [N, K, C] (stride 0 over space), or None.
    """
    found = linear_of_mean(output, edge, shape)
    if found is None:
        return None
    channel, weight = found
    if classes.stride(0) == 0:  # the same for all samples
        classes = classes[:1]
    return spread(weight[classes], channel, shape)


def spread(by_mean: Tensor, channel: int, shape: Sequence[int]) -> Tensor:
    """Derivatives by activations, from those by their mean over space.

    Args:
        by_mean: [N, C] or [N, K, C]; N may be 1 for all samples.
        channel: the channels' dimension in shape.
        shape: of the activations, [N, ...].
    Returns: [N, *shape[1:]] or [N, K, *shape[1:]], expanded (stride 0 over space).
    """
    sizes = [1] * len(shape[1:])
    sizes[channel - 1] = shape[channel]
    between = by_mean.shape[1:-1]
    by_each = by_mean / (math.prod(shape[1:]) // shape[channel])
    return by_each.reshape(len(by_mean), *between, *sizes).expand(shape[0], *between, *shape[1:])


def linear_of_mean(
    output: Tensor, edge: GradientEdge, shape: Sequence[int]
) -> tuple[int, Tensor] | None:
    """The channels' dimension and weight [classes, C], if output = linear(mean(activations))."""
    linear = output.grad_fn
    if linear is None or linear.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    addmm: Any = linear
    scaled = linear.name() == "AddmmBackward0" and (addmm._saved_alpha, addmm._saved_beta) != (1, 1)
    node = linear.next_functions[-2][0]  # of (bias, input, weight) or (input, weight)
    while node is not None and _only_reshapes(node):
        node = node.next_functions[0][0]
    if scaled or node is None or node.name() != "MeanBackward1":
        return None
    mean: Any = node
    averaged = {dim % len(shape) for dim in mean._saved_dim}
    kept = [dim for dim in range(len(shape)) if dim not in averaged]
    weight: Tensor | None = addmm._saved_mat2
    if mean.next_functions[0][0] is not edge.node or weight is None or kept[:1] != [0]:
        return None
    if len(kept) != 2 or len(weight) != shape[kept[1]]:
        return None
    return kept[1], weight.detach().t()


def _only_reshapes(node: Any) -> bool:
    name = node.name().rstrip("0123456789")
    if name == "AsStridedBackward":  # adaptive pooling adds it to channels-last tensors
        strides = accumulate(reversed(node._saved_size), mul, initial=1)
        contiguous = list(strides)[-2::-1]
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(
                node._saved_size, node._saved_stride, contiguous, strict=True
            )
        )
    return name in _RESHAPING
