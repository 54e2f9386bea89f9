"""The table of methods: what each rule from activations and gradients to a map is called.

A method stands in three places: its rule in ``csrc/math/methods.h``, its row here, and its oracle
in ``reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way from activations A and gradients G to a map L.

    Attributes:
        name: what the user calls it.
        rectify: whether A is replaced by relu(A) unless the caller says otherwise.
        eps: default of the method's epsilon; None where its formula has none.
        channelwise: whether it has channel weights w with L = sum_k w_k A_k.
        source: the paper, or the project whose definition it is.
    """

    name: str
    rectify: bool
    eps: float | None
    channelwise: bool
    source: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("gradcampp", True, 0.0, True, "arXiv:1710.11063, eq. 7 and 19"),
        Method("gradcampp_normalized", True, 0.0, True, "released code of arXiv:1710.11063"),
        Method("gradcam", False, None, True, "arXiv:1610.02391, eq. 1 and 2"),
        Method("xgradcam", False, 0.0, True, "arXiv:2008.02312, eq. 9"),
        Method("layercam", False, None, False, "LayerCAM, IEEE TIP 2021, eq. 5 and 6"),
        Method("hirescam", False, None, False, "arXiv:2011.08891, eq. 3"),
        Method("gradcam_elementwise", False, None, False, "pytorch-grad-cam"),
        Method("attention", False, 1e-8, True, "spatial attention over the Grad-CAM activation"),
    )
}


def get(name: str) -> Method:
    """The method of that name; ValueError lists the names there are."""
    try:
        return METHODS[name]
    except (KeyError, TypeError):  # also for what cannot be a key
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}") from None
