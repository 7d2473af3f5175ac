"""Scaling and cropping as a part of a graph of OpenVINO: nearly to the pixels of `fit_size`.

All of it is done in whole numbers. On CPUs that can, OpenVINO computes in bfloat16 unless told not
to, and in bfloat16 neither the places of pixels nor their values are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sktransfer.transforms import Preprocessing

if TYPE_CHECKING:
    from openvino import Node

_MODES = {"bilinear": "bilinear_pillow", "bicubic": "bicubic_pillow"}


def scaling(preprocessing: Preprocessing) -> tuple[Any, Node]:
    """Return a parameter and what becomes of it.

    It takes uint8 `images` (n, c, any height, any width); what comes out is uint8 with channels
    last, (n, *size, c).
    """
    from openvino import PartialShape, Type
    from openvino import opset13 as op

    n_channels, height, width = preprocessing.shape
    images = op.parameter(PartialShape([-1, n_channels, -1, -1]), Type.u8, name="images")
    shape = op.shape_of(images, "i64")
    n, _, tall, wide = (op.gather(shape, _whole([i]), _whole(0)) for i in range(4))
    scaled_tall, scaled_wide = _scaled_size(preprocessing, tall, wide)
    # First across, then down, as torch does. OpenVINO scales all channels of a place at once: what
    # lies on the other axis is made a part of them, which is faster.
    columns = op.transpose(images, _whole([0, 3, 1, 2]))  # (n, w, c, h)
    lines = [n, _whole([1]), wide, op.multiply(tall, _whole([n_channels]))]
    across = _resized(_shaped(columns, lines), [_whole([1]), scaled_wide], preprocessing)
    across = _shaped(across, [n, scaled_wide, _whole([n_channels]), tall])
    across, outside_x = _fitted(across, scaled_wide, width, preprocessing)
    rows = op.transpose(across, _whole([0, 3, 1, 2]))  # (n, h, width, c)
    lines = [n, tall, _whole([1]), _whole([width * n_channels])]
    down = _resized(_shaped(rows, lines), [scaled_tall, _whole([1])], preprocessing)
    down = _shaped(down, [n, scaled_tall, _whole([width]), _whole([n_channels])])
    fitted, outside_y = _fitted(down, scaled_tall, height, preprocessing)
    if preprocessing.mode == "border":
        at_y = op.reshape(outside_y, _whole([1, height, 1, 1]), False)
        at_x = op.reshape(outside_x, _whole([1, 1, width, 1]), False)
        fill = np.array([round(255 * mean) for mean in preprocessing.mean])
        colour = op.constant(fill.clip(0, 255).astype(np.uint8).reshape(1, 1, 1, -1))
        fitted = op.select(op.logical_or(at_y, at_x), colour, fitted)
    # The sizes are known, which OpenVINO does not see.
    target = _shaped(fitted, [n, _whole([height, width, n_channels])])
    return images, target


def _whole(value: Any) -> Node:
    """Return whole numbers as a constant."""
    from openvino import opset13 as op

    return op.constant(np.array(value, np.int64))


def _shaped(x: Node, sides: list[Node]) -> Node:
    from openvino import opset13 as op

    return op.reshape(x, op.concat(sides, 0), False)


def _resized(x: Node, sides: list[Node], preprocessing: Preprocessing) -> Node:
    """Scale the two middle axes, with antialiasing, as Pillow does."""
    from openvino import opset11, opset13

    return opset11.interpolate(
        x,
        opset13.concat(sides, 0),
        _MODES[preprocessing.interpolation],
        "sizes",
        pads_begin=[0, 0, 0, 0],
        pads_end=[0, 0, 0, 0],
        coordinate_transformation_mode="half_pixel",
        cube_coeff=-0.5,
        axes=_whole([1, 2]),
    )


def _scaled_size(preprocessing: Preprocessing, tall: Node, wide: Node) -> tuple[Node, Node]:
    """Return the sides that an image is scaled to: see `Preprocessing.scaled_size`."""
    from openvino import opset13 as op

    height, width = (_whole([side]) for side in preprocessing.resize)
    if preprocessing.mode == "squash":
        return height, width
    by_height, by_width = op.multiply(height, wide), op.multiply(width, tall)
    if preprocessing.mode == "border":
        is_tall = op.less_equal(by_height, by_width)
        scaled_tall = op.select(is_tall, height, _rounded_quotient(by_width, wide))
        scaled_wide = op.select(is_tall, _rounded_quotient(by_height, tall), width)
        return op.maximum(scaled_tall, _whole([1])), op.maximum(scaled_wide, _whole([1]))
    is_wide = op.greater_equal(by_height, by_width)
    scaled_tall = op.maximum(height, op.divide(by_width, wide))
    scaled_wide = op.maximum(width, op.divide(by_height, tall))
    return op.select(is_wide, height, scaled_tall), op.select(is_wide, scaled_wide, width)


def _rounded_quotient(number: Node, divisor: Node) -> Node:
    """Return the nearest whole number to a quotient; of two, the even one."""
    from openvino import opset13 as op

    two = _whole([2])
    above, below = op.add(op.multiply(number, two), divisor), op.multiply(divisor, two)
    quotient = op.divide(above, below)
    is_between = op.equal(op.multiply(quotient, below), above)
    odd = op.subtract(quotient, op.multiply(op.divide(quotient, two), two))
    return op.subtract(quotient, op.select(is_between, odd, _whole([0])))


def _fitted(
    x: Node, length: Node, size: int, preprocessing: Preprocessing
) -> tuple[Node, Node | None]:
    """Crop the first of the middle axes to its centre, and pad it with black if it is too short.

    Returns
    -------
    Node
        Of this size along the axis.
    Node or None
        Which places of the axis lie outside of the image; None if none can.
    """
    from openvino import opset13 as op

    mode = preprocessing.mode
    pairs = zip(preprocessing.size, preprocessing.resize, strict=True)
    is_larger = any(side > scaled for side, scaled in pairs)
    zero, one, two = _whole([0]), _whole([1]), _whole([2])
    over = op.maximum(op.subtract(length, _whole([size])), zero)
    start = op.divide(over, two)
    if mode != "floor" or is_larger:  # half of an odd number is rounded to an even one
        odd = op.subtract(over, op.multiply(start, two))
        start_is_odd = op.subtract(start, op.multiply(op.divide(start, two), two))
        start = op.add(start, op.multiply(odd, start_is_odd))
    cropped = op.slice(x, start, op.add(start, _whole([size])), one, _whole([1]))
    if mode != "border" and not is_larger:
        return cropped, None
    missing = op.maximum(op.subtract(_whole([size]), length), zero)
    before = op.divide(missing, two)
    begins = op.concat([zero, before, zero, zero], 0)
    ends = op.concat([zero, op.subtract(missing, before), zero, zero], 0)
    padded = op.pad(cropped, begins, ends, "constant", op.constant(np.uint8(0)))
    place = op.subtract(_whole(range(size)), before)
    outside = op.logical_or(op.less(place, zero), op.greater_equal(place, length))
    return padded, outside
