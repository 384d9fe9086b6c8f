"""Mega's operators as ONNX functions of domain ``mega``, with bodies of standard operators.

Names and formulas are those of `reference.ops`; a runtime that does not know Mega runs the bodies.
They are written in ONNX's own text form, for any batch, length and width. How each is written was
chosen by measuring ONNX Runtime and OpenVINO (default model, one thread, us at T=60, ms at T=1024):

==============  ===========================  =============  =============
operator        form                         T=60           T=1024
==============  ===========================  =============  =============
ema_scan        chunks of 64, **this one**   4595 / 4774    123 / 121
ema_scan        Scan, one step a frame       4825 / 6917    128 / 160
L1 distances    Scan, 4 rows, **this one**   6336 / 6631    455 / 400
L1 distances    Scan, 1 row                  7079 / 8027    530 / 572
L1 distances    Scan, 16 rows                6426 / 6804    732 / 382
L1 distances    ``[B, T, T, H]``             6565 / 6165    956 / 504
==============  ===========================  =============  =============

OpenVINO's Scan sees no value from outside its body, so that keys are a state that never changes;
and its ``ReduceL1`` misreads opset 17, which is why Abs and ReduceSum stand here.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

DOMAIN = "mega"
VERSION = 1
OPSET = 17

# h_t = a h_{t-1} + (1 - a) p_t, a = sigmoid(alpha), in chunks of 64 frames: inside a chunk a
# triangular Toeplitz product, between chunks a second one over their last states. Powers are
# a^n = exp(-n rate) with n >= 0: none is divided by, so any length is sound.
#   rate = -log(a) = relu(-alpha) + l,  1 - a = exp(-relu(alpha) - l),  l = log1p(exp(-|alpha|)),
# with log1p(z) = 2 atanh(z / (z + 2)), since the runtimes' own Softplus and Sigmoid are exact to
# 1e-7 of 1, not of themselves: at a = 1 - 1e-6 they would be off by a tenth.
_EMA_SCAN = """
<opset_import: ["" : 17], domain: "mega">
ema_scan (p, alpha) => (h)
{
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  size = Constant <value_float: float = 64.0> ()
  first = Constant <value_int: int = 0> ()
  step = Constant <value_int: int = 1> ()
  frames = Constant <value_int: int = 64> ()
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  axes_12 = Constant <value_ints: ints = [1, 2]> ()

  two = Constant <value_float: float = 2.0> ()
  minus_alpha = Neg (alpha)
  magnitude = Abs (alpha)
  minus_magnitude = Neg (magnitude)
  z = Exp (minus_magnitude)
  z_plus_2 = Add (z, two)
  ratio = Div (z, z_plus_2)
  half_log1p = Atanh (ratio)
  log1p = Mul (half_log1p, two)
  linear = Relu (minus_alpha)
  rate_d = Add (linear, log1p)
  rate = Unsqueeze (rate_d, axes_12)
  gain_linear = Relu (alpha)
  gain_rate = Add (gain_linear, log1p)
  minus_gain_rate = Neg (gain_rate)
  gain_d = Exp (minus_gain_rate)
  gain = Unsqueeze (gain_d, axes_12)

  t_int = Range (first, frames, step)
  t = Cast <to: int = 1> (t_int)
  t_row = Unsqueeze (t, axis_0)
  t_column = Unsqueeze (t, axis_1)
  lag = Sub (t_row, t_column)
  is_past = GreaterOrEqual (lag, zero)
  past_lag = Max (lag, zero)
  log_power = Mul (rate, past_lag)
  minus_log_power = Neg (log_power)
  power = Exp (minus_log_power)
  past_power = Where (is_past, power, zero)
  toeplitz = Mul (gain, past_power)

  length = Shape <start: int = 1, end: int = 2> (p)
  chunk = Constant <value_ints: ints = [64]> ()
  minus_length = Neg (length)
  missing = Mod (minus_length, chunk)
  no_pads = Constant <value_ints: ints = [0, 0, 0, 0, 0]> ()
  pads = Concat <axis: int = 0> (no_pads, missing)
  p_bdt = Transpose <perm: ints = [0, 2, 1]> (p)
  padded = Pad (p_bdt, pads)
  to_chunks = Constant <value_ints: ints = [0, 0, -1, 64]> ()
  chunks = Reshape (padded, to_chunks)
  inside = MatMul (chunks, toeplitz)

  count_1 = Shape <start: int = 2, end: int = 3> (chunks)
  count = Squeeze (count_1, axis_0)
  c_int = Range (first, count, step)
  c = Cast <to: int = 1> (c_int)
  c_row = Unsqueeze (c, axis_0)
  c_column = Unsqueeze (c, axis_1)
  c_distance = Sub (c_row, c_column)
  c_lag = Sub (c_distance, one)
  c_is_past = GreaterOrEqual (c_lag, zero)
  c_past_lag = Max (c_lag, zero)
  c_rate = Mul (rate, size)
  c_log_power = Mul (c_rate, c_past_lag)
  minus_c_log_power = Neg (c_log_power)
  c_power = Exp (minus_c_log_power)
  c_toeplitz = Where (c_is_past, c_power, zero)
  final = Constant <value_ints: ints = [63]> ()
  last = Gather <axis: int = 3> (inside, final)
  last_row = Transpose <perm: ints = [0, 1, 3, 2]> (last)
  entering_row = MatMul (last_row, c_toeplitz)
  entering = Transpose <perm: ints = [0, 1, 3, 2]> (entering_row)

  age = Add (t_row, one)
  log_decay = Mul (rate, age)
  minus_log_decay = Neg (log_decay)
  decay = Exp (minus_log_decay)
  carried = Mul (entering, decay)
  state = Add (inside, carried)
  to_frames = Constant <value_ints: ints = [0, 0, -1]> ()
  frames_bdt = Reshape (state, to_frames)
  h_bdt = Slice (frames_bdt, axis_0, length, axis_2)
  h = Transpose <perm: ints = [0, 2, 1]> (h_bdt)
}
"""

# A = softmax(q k^T / sqrt(H)), the future masked. Its denominator is at least 1, so that the 1e-8
# which Mega adds to it is below float32's resolution: the runtimes' own Softmax serves.
_SOFTMAX_ATTENTION = """
<opset_import: ["" : 17], domain: "mega">
gated_attention <laplace: int = 0> (q, k, v, gate) => (y)
{
  k_t = Transpose <perm: ints = [0, 2, 1]> (k)
  products = MatMul (q, k_t)
  width_int = Shape <start: int = 2, end: int = 3> (q)
  width = Cast <to: int = 1> (width_int)
  root = Sqrt (width)
  scores = Div (products, root)
  length = Shape <start: int = 1, end: int = 2> (q)
  square = Concat <axis: int = 0> (length, length)
  masked_score = ConstantOfShape <value: tensor = float[1] {-1e9}> (square)
  above_diagonal = Constant <value_int: int = 1> ()
  mask = Trilu <upper: int = 1> (masked_score, above_diagonal)
  causal_scores = Add (scores, mask)
  weights = Softmax <axis: int = -1> (causal_scores)
  mixed = MatMul (weights, v)
  y = Mul (gate, mixed)
}
"""

# w_ij = 1 / (1 + sum_d |q_id - k_jd|), the differences of 4 query rows at a time.
_LAPLACE_ATTENTION = """
<opset_import: ["" : 17], domain: "mega">
gated_attention <laplace: int = 1> (q, k, v, gate) => (y)
{
  one = Constant <value_float: float = 1.0> ()
  epsilon = Constant <value_float: float = 1e-8> ()
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  axis_last = Constant <value_ints: ints = [-1]> ()
  any_size = Constant <value_ints: ints = [-1]> ()
  rows = Constant <value_ints: ints = [4]> ()
  batch = Shape <start: int = 0, end: int = 1> (q)
  length = Shape <start: int = 1, end: int = 2> (q)
  width = Shape <start: int = 2, end: int = 3> (q)

  minus_length = Neg (length)
  missing = Mod (minus_length, rows)
  no_pads = Constant <value_ints: ints = [0, 0, 0, 0]> ()
  pads = Concat <axis: int = 0> (no_pads, missing, axis_0)
  padded = Pad (q, pads)
  to_blocks = Concat <axis: int = 0> (batch, any_size, rows, axis_1, width)
  blocks_b = Reshape (padded, to_blocks)
  blocks = Transpose <perm: ints = [1, 0, 2, 3, 4]> (blocks_b)
  keys = Unsqueeze (k, axis_1)
  keys_after, block_distances = Scan <
    num_scan_inputs: int = 1,
    body: graph = distances_of_rows (
      float[B, 1, T, H] keys_in, float[B, 4, 1, H] q_rows
    ) => (float[B, 1, T, H] keys_out, float[B, 4, T] distances) {
      keys_out = Identity (keys_in)
      difference = Sub (q_rows, keys_in)
      magnitude = Abs (difference)
      features = Constant <value_ints: ints = [-1]> ()
      distances = ReduceSum <keepdims: int = 0> (magnitude, features)
    }
  > (keys, blocks)
  to_rows = Concat <axis: int = 0> (batch, any_size, length)
  distances_b = Transpose <perm: ints = [1, 0, 2, 3]> (block_distances)
  padded_distance = Reshape (distances_b, to_rows)
  distance = Slice (padded_distance, axis_0, length, axis_1)

  denominator = Add (distance, one)
  weights = Reciprocal (denominator)
  total = ReduceSum <keepdims: int = 1> (weights, axis_last)
  normalizer = Add (total, epsilon)
  weighted = MatMul (weights, v)
  mixed = Div (weighted, normalizer)
  y = Mul (gate, mixed)
}
"""

# Where var < eps the factor is rsqrt(eps) in place of rsqrt(var + eps).
_AXON_LAYER_NORM = """
<opset_import: ["" : 17], domain: "mega">
axon_layer_norm (x, gamma, beta) => (y)
{
  epsilon = Constant <value_float: float = 1e-5> ()
  mean = ReduceMean <axes: ints = [-1], keepdims: int = 1> (x)
  centred = Sub (x, mean)
  square = Mul (centred, centred)
  variance = ReduceMean <axes: ints = [-1], keepdims: int = 1> (square)
  is_small = Less (variance, epsilon)
  sum = Add (variance, epsilon)
  chosen = Where (is_small, epsilon, sum)
  deviation = Sqrt (chosen)
  normalized = Div (centred, deviation)
  scaled = Mul (normalized, gamma)
  y = Add (scaled, beta)
}
"""


@functools.cache
def ema_scan() -> onnx.FunctionProto:
    """Return ``mega.ema_scan(p [B, T, D], alpha [D]) -> h [B, T, D]``."""
    return onnx.parser.parse_function(_EMA_SCAN)


@functools.cache
def gated_attention(laplace: bool) -> onnx.FunctionProto:
    """Return ``mega.gated_attention(q, k, v, gate [B, T, H]) -> y [B, T, H]`` in one form.

    The attribute ``laplace`` names the form for a reader; a body has one form, and so a file.
    """
    return onnx.parser.parse_function(_LAPLACE_ATTENTION if laplace else _SOFTMAX_ATTENTION)


@functools.cache
def axon_layer_norm() -> onnx.FunctionProto:
    """Return ``mega.axon_layer_norm(x [..., H], gamma [H], beta [H]) -> y [..., H]``."""
    return onnx.parser.parse_function(_AXON_LAYER_NORM)
