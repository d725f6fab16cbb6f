"""A label map of patch and text features: the third graph, as ONNX text.

Written in ONNX's own notation and not traced from PyTorch, since it must run row by row: `Scan` holds the scores of
one row of pixels, (width x names) numbers, where a picture's are (names x height x width). What is computed is
`segmentation_spar.segment` without its thresholds: bilinear cosines at the image's size, arg-max over names, and the
probability of the winner's class, synonyms added up.
"""

from __future__ import annotations

from typing import Any

from ..extras import extra_package

# Positions of one axis' pixels on the grid (`grid_spar.axis_positions`): the patch before, the patch after, the
# weight of the one after.
AXIS = """
  {a}_at = Constant<value_int = {place}>()
  {a}_size = Gather(size_hw, {a}_at)
  {a}_image = Gather(image_hw, {a}_at)
  {a}_grid = Gather(grid_hw, {a}_at)
  {extent}
  {a}_image_d = Cast<to = 11>({a}_image)
  {a}_extent_d = Cast<to = 11>({a}_extent)
  {a}_size_d = Cast<to = 11>({a}_size)
  {a}_grid_d = Cast<to = 11>({a}_grid)
  {a}_pixels = Range(zero, {a}_size, one)
  {a}_pixels_d = Cast<to = 11>({a}_pixels)
  {a}_centres = Add({a}_pixels_d, half)
  {a}_shares = Div({a}_centres, {a}_size_d)
  {a}_coverage = Div({a}_image_d, {a}_extent_d)
  {a}_covered = Mul({a}_shares, {a}_coverage)
  {a}_scaled = Mul({a}_covered, {a}_grid_d)
  {a}_places = Sub({a}_scaled, half)
  {a}_last = Sub({a}_grid, one)
  {a}_last_d = Cast<to = 11>({a}_last)
  {a}_kept = Clip({a}_places, zero_d, {a}_last_d)
  {a}_before = Cast<to = 7>({a}_kept)
  {a}_next = Add({a}_before, one)
  {a}_after = Min({a}_next, {a}_last)
  {a}_before_d = Cast<to = 11>({a}_before)
  {a}_rest = Sub({a}_kept, {a}_before_d)
  {a}_weight = Cast<to = 1>({a}_rest)
"""

# The pixels that the grid covers; see `grid_spar.fit_to_patches`.
EXTENT = {
    "floor": "{a}_whole = Div({a}_image, patch_px)\n  {a}_extent = Mul({a}_whole, patch_px)",
    "pad": "{a}_up = Add({a}_image, patch_less_1)\n  {a}_whole = Div({a}_up, patch_px)\n"
    "  {a}_extent = Mul({a}_whole, patch_px)",
    "stretch": "{a}_extent = Identity({a}_image)",
}

GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}], producer_name: "spar-hf">
label_map (
  float[rows, columns, dim] patch_embeds, float[names, dim] text_embeds, int64[names] class_ids,
  int64[2] size_hw, int64[2] image_hw,
  bool[names_or_1] contending, float logit_scale, bool with_probabilities
) => (int32[height, width] labels, float[height, width] cosines, float[height, width] probabilities) {{
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  patch_px = Constant<value_int = {patch_px}>()
  patch_less_1 = Constant<value_int = {patch_less_1}>()
  half = Constant<value = double {{0.5}}>()
  zero_d = Constant<value = double {{0.0}}>()
  tiny = Constant<value = float {{1e-12}}>()
  last_axis = Constant<value_ints = [-1]>()
  grid_hw = Shape<start = 0, end = 2>(patch_embeds)
  {down}
  {across}
  patch_lengths = ReduceL2<keepdims = 1>(patch_embeds, last_axis)
  patch_safe = Max(patch_lengths, tiny)
  patches = Div(patch_embeds, patch_safe)
  text_lengths = ReduceL2<keepdims = 1>(text_embeds, last_axis)
  text_safe = Max(text_lengths, tiny)
  words = Div(text_embeds, text_safe)
  words_t = Transpose<perm = [1, 0]>(words)
  scores = MatMul(patches, words_t)
  x_weights = Unsqueeze(x_weight, last_axis)
  minus_infinity = Constant<value = float {{-inf}}>()
  labels, cosines, probabilities = Scan<num_scan_inputs = 3, body = row (
    int64 before, int64 after, float weight
  ) => (int32[width] row_labels, float[width] best, float[width] probability) {{
    above = Gather<axis = 0>(scores, before)
    below = Gather<axis = 0>(scores, after)
    down = Sub(below, above)
    down_part = Mul(down, weight)
    line = Add(above, down_part)
    left = Gather<axis = 0>(line, x_before)
    right = Gather<axis = 0>(line, x_after)
    along = Sub(right, left)
    along_part = Mul(along, x_weights)
    row_cosines = Add(left, along_part)
    running = Where(contending, row_cosines, minus_infinity)
    winner = ArgMax<axis = 1, keepdims = 0>(running)
    best = ReduceMax<keepdims = 0>(running, last_axis)
    ids = Gather<axis = 0>(class_ids, winner)
    row_labels = Cast<to = 6>(ids)
    probability = If(with_probabilities)<then_branch = yes () => (float[width] summed) {{
      logits = Mul(row_cosines, logit_scale)
      softmax = Softmax<axis = 1>(logits)
      own = Unsqueeze(ids, last_axis)
      same = Equal(own, class_ids)
      mask = Cast<to = 1>(same)
      of_group = Mul(softmax, mask)
      summed = ReduceSum<keepdims = 0>(of_group, last_axis)
    }}, else_branch = no () => (float[width] ones) {{
      nothing = Sub(best, best)
      ones = Exp(nothing)
    }}>
  }}>(y_before, y_after, y_weight)
}}
"""


def label_graph(size_rule: str, patch_px: int, opset: int) -> Any:
    """The graph as an `onnx.ModelProto`.

    Inputs: `patch_embeds` (h, w, D) of one image; `text_embeds` (K, D); `class_ids` (K), the class of each name;
    `size_hw`, height and width of the label map; `image_hw`, those of the pixels that the vision tower saw;
    `contending` (K or 1), which names may win; `logit_scale`, the factor on cosines before the soft-max; and
    `with_probabilities`. None has a default: onnxruntime-web takes no value for an input that has one.

    Outputs, each (H, W): `labels`, the class of the best name, int32; `cosines`, its score; `probabilities`, of its
    class, those of its names added up; 1 where they are not asked for.

    Args:
        size_rule: how the tower fits images to patches; see `grid_spar.fit_to_patches`.
        patch_px: side of a patch.
        opset: of ONNX's operators.
    """
    onnx = extra_package("onnx", "onnx")
    parser = extra_package("onnx.parser", "onnx")
    axes = {
        name: AXIS.format(a=a, place=place, extent=EXTENT[size_rule].format(a=a)).strip()
        for name, a, place in (("down", "y", 0), ("across", "x", 1))
    }
    text = GRAPH.format(opset=opset, patch_px=patch_px, patch_less_1=patch_px - 1, **axes)
    model = parser.parse_model(text)
    onnx.checker.check_model(model)
    return model
