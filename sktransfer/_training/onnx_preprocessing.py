"""Scaling and cropping as a part of an ONNX graph: to the pixels of `Preprocessing.fit_size`.

Torch scales images of 8 bits along one axis after the other, with weights that it rounds to whole
numbers, and rounds to 8 bits in between. The graph does the same by two products of matrices.
"""

from __future__ import annotations

from typing import Any

from sktransfer.transforms import Preprocessing

# What a pixel weighs at a distance, in pixels: the filters of Pillow.
_CUBIC = """{x}_lt1 = Less ({x}_d, one)
 {x}_n1 = Mul ({x}_d, onehalf)
 {x}_n2 = Sub ({x}_n1, twohalf)
 {x}_n3 = Mul ({x}_n2, {x}_d)
 {x}_n5 = Mul ({x}_n3, {x}_d)
 {x}_n4 = Add ({x}_n5, one)
 {x}_f1 = Sub ({x}_d, five)
 {x}_f2 = Mul ({x}_f1, {x}_d)
 {x}_f3 = Add ({x}_f2, eight)
 {x}_f5 = Mul ({x}_f3, {x}_d)
 {x}_f6 = Sub ({x}_f5, four)
 {x}_f4 = Mul ({x}_f6, minushalf)
 {x}_near = Where ({x}_lt1, {x}_n4, {x}_f4)
 {x}_lt2 = Less ({x}_d, two)
 {x}_f = Where ({x}_lt2, {x}_near, zero)"""
_CUBIC_NUMBERS = {
    **{"onehalf": 1.5, "twohalf": 2.5, "minushalf": -0.5},
    **{"four": 4.0, "five": 5.0, "eight": 8.0},
}
_LINEAR = "{x}_w = Sub (one, {x}_d)\n {x}_f = Max ({x}_w, zero)"
_FILTERS = {"bilinear": _LINEAR, "bicubic": _CUBIC}

# Of one axis {x}, with L pixels that are scaled to {x}_S, of which {size} are kept. Distances are
# quotients of whole numbers, so programs that compute in float32 have the same weights. These are
# made for the first and last places as well, where they are largest: by the largest of all, they
# are brought to whole numbers.
_AXIS = """
 {x}_size = Constant <value = double {{{size}.0}}> ()
 {x}_over = Sub ({x}_S, {x}_size)
 {x}_half = Div ({x}_over, two)
 {x}_cut = {cut} ({x}_half)
 {x}_neghalf = Neg ({x}_half)
 {x}_floor = Floor ({x}_neghalf)
 {x}_pad = Neg ({x}_floor)
 {x}_isover = GreaterOrEqual ({x}_over, zero)
 {x}_start = Where ({x}_isover, {x}_cut, {x}_pad)
 {x}_range = Range (zero, {x}_size, one)
 {x}_kept = Add ({x}_range, {x}_start)
 {x}_last = Sub ({x}_S, ends1)
 {x}_all = Concat <axis = 0> ({x}_kept, ends0, {x}_last)
 {x}_notlow = GreaterOrEqual ({x}_all, zero)
 {x}_nothigh = Less ({x}_all, {x}_S)
 {x}_in = And ({x}_notlow, {x}_nothigh)
 {x}_all2 = Mul ({x}_all, two)
 {x}_all3 = Add ({x}_all2, one)
 {x}_all4 = Mul ({x}_all3, {x}_L)
 {x}_column = Unsqueeze ({x}_all4, axis1)
 {x}_pixels = Range (zero, {x}_L, one)
 {x}_pixels2 = Mul ({x}_pixels, two)
 {x}_pixels3 = Add ({x}_pixels2, one)
 {x}_pixels4 = Mul ({x}_pixels3, {x}_S)
 {x}_away = Sub ({x}_pixels4, {x}_column)
 {x}_longer = Max ({x}_L, {x}_S)
 {x}_longer2 = Mul ({x}_longer, two)
 {x}_away2 = Div ({x}_away, {x}_longer2)
 {x}_d = Abs ({x}_away2)
 {filter}
 {x}_incol = Unsqueeze ({x}_in, axis1)
 {x}_raw = Where ({x}_incol, {x}_f, zero)
 {x}_sum0 = ReduceSum <keepdims = 1> ({x}_raw, axis1)
 {x}_sum = Where ({x}_incol, {x}_sum0, one)
 {x}_weights = Div ({x}_raw, {x}_sum)
 {x}_most = ReduceMax <keepdims = 0> ({x}_weights)
 {x}_tries0 = Mul ({x}_most, powers)
 {x}_tries1 = Add ({x}_tries0, half)
 {x}_tries2 = Floor ({x}_tries1)
 {x}_fits = Less ({x}_tries2, limit)
 {x}_counts = Cast <to = 11> ({x}_fits)
 {x}_bits = ReduceSum <keepdims = 0> ({x}_counts)
 {x}_unit = Pow (two, {x}_bits)
 {x}_scaled = Mul ({x}_weights, {x}_unit)
 {x}_size0 = Abs ({x}_scaled)
 {x}_size1 = Add ({x}_size0, half)
 {x}_size2 = Floor ({x}_size1)
 {x}_sign = Sign ({x}_scaled)
 {x}_whole = Mul ({x}_size2, {x}_sign)
 {x}_cutto = Constant <value_ints = [{size}]> ()
 {x}_mine = Slice ({x}_whole, at0, {x}_cutto, at0)
 {x}_matrix = Cast <to = 1> ({x}_mine)
 {x}_unit32 = Cast <to = 1> ({x}_unit)
 {x}_add = Mul ({x}_unit32, half32)
 {x}_inkept = Slice ({x}_in, at0, {x}_cutto, at0)
"""
_ROUND = """
 {y}_1 = Add ({y}_0, {x}_add)
 {y}_2 = Div ({y}_1, {x}_unit32)
 {y}_3 = Floor ({y}_2)
 {y} = Clip ({y}_3, zero32, white32)
"""
# How long the sides are that an image is scaled to: see `Preprocessing.scaled_size`.
_SCALED = {
    "squash": " y_S = Identity (resize_y)\n x_S = Identity (resize_x)\n",
    "center": """
 ratio_y = Div (resize_y, y_L)
 ratio_x = Div (resize_x, x_L)
 by_y = GreaterOrEqual (ratio_y, ratio_x)
 wide0 = Mul (resize_y, x_L)
 wide1 = Div (wide0, y_L)
 wide2 = Floor (wide1)
 wide = Max (resize_x, wide2)
 tall0 = Mul (resize_x, y_L)
 tall1 = Div (tall0, x_L)
 tall2 = Floor (tall1)
 tall = Max (resize_y, tall2)
 y_S = Where (by_y, resize_y, tall)
 x_S = Where (by_y, wide, resize_x)
""",
    "border": """
 ratio_y = Div (resize_y, y_L)
 ratio_x = Div (resize_x, x_L)
 ratio = Min (ratio_y, ratio_x)
 y_S0 = Mul (y_L, ratio)
 y_S1 = Round (y_S0)
 y_S = Max (y_S1, one)
 x_S0 = Mul (x_L, ratio)
 x_S1 = Round (x_S0)
 x_S = Max (x_S1, one)
""",
}
_SCALED["floor"] = _SCALED["center"]
_FILL = """
 y_rows = Unsqueeze (y_inkept, axis1)
 both = And (y_rows, x_inkept)
 fitted = Where (both, scaled, fill)
"""
_PLACES = ", double[4] scale, double[4] offset, double[4] ends"
_PLACE = """
 scale_x0 = Div (x_S, x_L)
 scale_y0 = Div (y_S, y_L)
 scale_x = Unsqueeze (scale_x0, at0)
 scale_y = Unsqueeze (scale_y0, at0)
 scale = Concat <axis = 0> (scale_x, scale_y, scale_x, scale_y)
 left = Unsqueeze (x_floor, at0)
 top = Unsqueeze (y_floor, at0)
 offset = Concat <axis = 0> (left, top, left, top)
 end_x = Unsqueeze (x_L, at0)
 end_y = Unsqueeze (y_L, at0)
 ends = Concat <axis = 0> (end_x, end_y, end_x, end_y)
"""


def preprocessing_model(
    preprocessing: Preprocessing, opset: int, ir_version: int, tells_place: bool = False
) -> Any:
    """Return the graph from uint8 `images` (n, c, any height, any width) to float32 `fitted`.

    These are the pixels (n, c, *size), from 0 to 255, that `fit_size` makes. With `tells_place`,
    which is for the mode "border", there are also `scale` and `offset`, those of `letterbox`, and
    `ends`, the width and height of the image, twice.
    """
    from onnx import parser

    c, height, width = preprocessing.shape
    kernel = _FILTERS[preprocessing.interpolation]
    numbers = {"zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "limit": 2.0**15}
    numbers |= _CUBIC_NUMBERS if preprocessing.interpolation == "bicubic" else {}
    numbers |= dict(zip(("resize_y", "resize_x"), map(float, preprocessing.resize), strict=True))
    lines = [f" {name} = Constant <value = double {{{x}}}> ()" for name, x in numbers.items()]
    for name, value in (("zero32", 0.0), ("half32", 0.5), ("white32", 255.0)):
        lines.append(f" {name} = Constant <value = float {{{value}}}> ()")
    powers = ", ".join(str(2.0 ** (bits + 1)) for bits in range(22))
    fill = ", ".join(str(float(round(255 * mean))) for mean in preprocessing.mean)
    fill = fill if preprocessing.mode == "border" else ", ".join(["0.0"] * c)
    lines.append(f""" powers = Constant <value = double[22] {{{powers}}}> ()
 ends0 = Constant <value = double[3] {{0.0, 1.0, 2.0}}> ()
 ends1 = Constant <value = double[3] {{1.0, 2.0, 3.0}}> ()
 fill = Constant <value = float[1,{c},1,1] {{{fill}}}> ()
 axis1 = Constant <value_ints = [1]> ()
 at0 = Constant <value_ints = [0]> ()
 pixels = Cast <to = 1> (images)
 y_L0 = Shape <start = 2, end = 3> (images)
 x_L0 = Shape <start = 3, end = 4> (images)
 scalar = Constant <value = int64[0] {{}}> ()
 y_L1 = Reshape (y_L0, scalar)
 x_L1 = Reshape (x_L0, scalar)
 y_L = Cast <to = 11> (y_L1)
 x_L = Cast <to = 11> (x_L1)""")
    axes = [("y", height), ("x", width)]
    cut = "Floor" if preprocessing.mode == "floor" else "Round"
    weights = [_AXIS.format(x=x, size=size, cut=cut, filter=kernel.format(x=x)) for x, size in axes]
    text = "\n".join(
        [
            f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>',
            f"fit_size (uint8[n,{c},height,width] images)",
            f"=> (float[n,{c},{height},{width}] fitted{_PLACES if tells_place else ''})",
            "{",
            *lines,
            _SCALED[preprocessing.mode],
            *weights,
            " x_turned = Transpose <perm = [1, 0]> (x_matrix)",
            " across_0 = MatMul (pixels, x_turned)",
            _ROUND.format(x="x", y="across"),
            " scaled_0 = MatMul (y_matrix, across)",
            _ROUND.format(x="y", y="scaled"),
            _FILL,
            _PLACE if tells_place else "",
            "}",
        ]
    )
    return parser.parse_model(text)
