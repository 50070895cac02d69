"""The Triton kernels of a residual layer; triton_layer.py launches them.

Every program walks over tiles of BLOCK_T samples of one clip, all channels at once, and holds the weights meanwhile.
Channels are padded with zeros to BLOCK_C, a power of two. Products take operands of DTYPE and are summed in fp32. Tested
by tests/test_triton.py.
"""

import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run on CPU tensors, slowly."""
    return not isinstance(forward_kernel, triton.JITFunction)


@triton.jit
def operand(values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return values rounded to DTYPE, for a product; WIDE: in fp32 again (the interpreter multiplies bf16's bits)."""
    values = values.to(DTYPE)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def load_times(rows, inside, times, samples):
    """Return (BLOCK_C, BLOCK_T) of a clip at `times`: 0 before and after the clip, and in the padding of the channels."""
    mask = inside[:, None] & (times >= 0)[None, :] & (times < samples)[None, :]
    return tl.load(rows + times[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(
    weight_ptr, c, C: tl.constexpr, gate: tl.constexpr, tap: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return filter_gate[gate * C + c, c, tap], (BLOCK_C, BLOCK_C)."""
    offsets = ((gate * C + c)[:, None] * C + c[None, :]) * 2 + tap
    mask = (c < C)[:, None] & (c < C)[None, :]
    return operand(tl.load(weight_ptr + offsets, mask=mask, other=0.0), DTYPE, WIDE)


@triton.jit
def two_taps(w_past, w_now, bias, past, now, PRECISION: tl.constexpr):
    """Return w_past @ past + w_now @ now + bias in fp32."""
    products = tl.dot(w_past, past, input_precision=PRECISION)
    return tl.dot(w_now, now, products, input_precision=PRECISION) + bias[:, None]


@triton.jit
def gates(filtered, gate, FULL: tl.constexpr):
    """Return (tanh(filtered), sigmoid(gate)) by two exponentials and one quotient.

    Near 0 the quotient loses tanh's leading digits: where FULL, a polynomial takes its place.
    """
    small = tl.exp(-2.0 * tl.abs(filtered))
    other = tl.exp(-tl.maximum(gate, -80.0))  # finite, so that 0 x infinity cannot be
    quotient = 1.0 / ((1.0 + small) * (1.0 + other))
    positive = (1.0 - small) * (1.0 + other) * quotient
    curved = tl.where(filtered < 0, -positive, positive)
    if FULL:
        square = filtered * filtered
        series = -17.0 / 315.0 + square * (62.0 / 2835.0)
        series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
        curved = tl.where(tl.abs(filtered) < 0.25, filtered * series, curved)
    return curved, (1.0 + small) * quotient


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, hidden_ptr, clips, samples, dilation,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
    OUT: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Write x + h where OUT, h where HIDDEN."""
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    filter_past = load_weight(weight_ptr, c, C, 0, 0, DTYPE, WIDE)
    filter_now = load_weight(weight_ptr, c, C, 0, 1, DTYPE, WIDE)
    gate_past = load_weight(weight_ptr, c, C, 1, 0, DTYPE, WIDE)
    gate_now = load_weight(weight_ptr, c, C, 1, 1, DTYPE, WIDE)
    filter_bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias_ptr + C + c, mask=inside, other=0.0).to(tl.float32)
    tiles = tl.cdiv(samples, BLOCK_T)
    for tile in range(tl.program_id(0), clips * tiles, tl.num_programs(0)):
        rows = ((tile // tiles).to(tl.int64) * C + c)[:, None] * samples  # beyond 2**31 in a batch
        times = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        x = load_times(x_ptr + rows, inside, times, samples)
        now = operand(x, DTYPE, WIDE)
        past = operand(load_times(x_ptr + rows, inside, times - dilation, samples), DTYPE, WIDE)
        filtered = two_taps(filter_past, filter_now, filter_bias, past, now, PRECISION)
        gate = two_taps(gate_past, gate_now, gate_bias, past, now, PRECISION)
        curved, opened = gates(filtered, gate, FULL)
        hidden = curved * opened
        mask = inside[:, None] & (times < samples)[None, :]
        if OUT:
            tl.store(out_ptr + rows + times[None, :], x.to(tl.float32) + hidden, mask=mask)
        if HIDDEN:
            tl.store(hidden_ptr + rows + times[None, :], hidden, mask=mask)


@triton.jit
def load_gradient(
    grad_out, grad_hidden, inside, times, samples, OUT: tl.constexpr, HIDDEN: tl.constexpr
):
    """Return the gradient of h in fp32, by way of x + h and directly."""
    gradient = tl.zeros((inside.shape[0], times.shape[0]), tl.float32)
    if OUT:
        gradient += load_times(grad_out, inside, times, samples)
    if HIDDEN:
        gradient += load_times(grad_hidden, inside, times, samples)
    return gradient


@triton.jit
def gate_gradients(
    filtered, gate, gradient, DTYPE: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr
):
    """Return the gradients of filtered and gate, rounded to DTYPE for the products that follow."""
    curved, opened = gates(filtered, gate, FULL)
    of_filter = gradient * opened * (1.0 - curved * curved)
    of_gate = gradient * curved * opened * (1.0 - opened)
    return operand(of_filter, DTYPE, WIDE), operand(of_gate, DTYPE, WIDE)


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, bias_ptr, grad_out_ptr, grad_hidden_ptr, grad_x_ptr, weight_parts_ptr,
    bias_parts_ptr, clips, samples, dilation,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
    OUT: tl.constexpr, HIDDEN: tl.constexpr, OF_X: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x where OF_X, and where OF_WEIGHTS this program's share of those of weight and bias.

    x[t] reaches the products at t and at t + dilation: both are computed here, so that nothing but x and the gradient of
    the outputs is read.
    """
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    filter_past = load_weight(weight_ptr, c, C, 0, 0, DTYPE, WIDE)
    filter_now = load_weight(weight_ptr, c, C, 0, 1, DTYPE, WIDE)
    gate_past = load_weight(weight_ptr, c, C, 1, 0, DTYPE, WIDE)
    gate_now = load_weight(weight_ptr, c, C, 1, 1, DTYPE, WIDE)
    filter_bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias_ptr + C + c, mask=inside, other=0.0).to(tl.float32)
    sum_filter_past = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sum_filter_now = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sum_gate_past = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sum_gate_now = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sum_filter_bias = tl.zeros((BLOCK_C,), tl.float32)
    sum_gate_bias = tl.zeros((BLOCK_C,), tl.float32)
    tiles = tl.cdiv(samples, BLOCK_T)
    for tile in range(tl.program_id(0), clips * tiles, tl.num_programs(0)):
        rows = ((tile // tiles).to(tl.int64) * C + c)[:, None] * samples
        times = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        later = times + dilation
        x, grad_out, grad_hidden = x_ptr + rows, grad_out_ptr + rows, grad_hidden_ptr + rows
        now = operand(load_times(x, inside, times, samples), DTYPE, WIDE)

        if OF_X:
            future = operand(load_times(x, inside, later, samples), DTYPE, WIDE)
            filtered = two_taps(filter_past, filter_now, filter_bias, now, future, PRECISION)
            gate = two_taps(gate_past, gate_now, gate_bias, now, future, PRECISION)
            gradient = load_gradient(grad_out, grad_hidden, inside, later, samples, OUT, HIDDEN)
            of_filter, of_gate = gate_gradients(filtered, gate, gradient, DTYPE, WIDE, FULL)
            grad_x = tl.dot(tl.trans(filter_past), of_filter, input_precision=PRECISION)
            grad_x = tl.dot(tl.trans(gate_past), of_gate, grad_x, input_precision=PRECISION)

        past = operand(load_times(x, inside, times - dilation, samples), DTYPE, WIDE)
        filtered = two_taps(filter_past, filter_now, filter_bias, past, now, PRECISION)
        gate = two_taps(gate_past, gate_now, gate_bias, past, now, PRECISION)
        gradient = load_gradient(grad_out, grad_hidden, inside, times, samples, OUT, HIDDEN)
        of_filter, of_gate = gate_gradients(filtered, gate, gradient, DTYPE, WIDE, FULL)
        if OF_X:
            grad_x = tl.dot(tl.trans(filter_now), of_filter, grad_x, input_precision=PRECISION)
            grad_x = tl.dot(tl.trans(gate_now), of_gate, grad_x, input_precision=PRECISION)
            if OUT:
                grad_x += load_times(grad_out, inside, times, samples)
            mask = inside[:, None] & (times < samples)[None, :]
            tl.store(grad_x_ptr + rows + times[None, :], grad_x, mask=mask)
        if OF_WEIGHTS:
            past, now = tl.trans(past), tl.trans(now)
            sum_filter_past = tl.dot(of_filter, past, sum_filter_past, input_precision=PRECISION)
            sum_filter_now = tl.dot(of_filter, now, sum_filter_now, input_precision=PRECISION)
            sum_gate_past = tl.dot(of_gate, past, sum_gate_past, input_precision=PRECISION)
            sum_gate_now = tl.dot(of_gate, now, sum_gate_now, input_precision=PRECISION)
            sum_filter_bias += tl.sum(of_filter.to(tl.float32), axis=1)
            sum_gate_bias += tl.sum(of_gate.to(tl.float32), axis=1)
    if OF_WEIGHTS:
        program = tl.program_id(0)
        parts = weight_parts_ptr + program * 4 * C * C + (c[:, None] * C + c[None, :]) * 2
        square = inside[:, None] & inside[None, :]
        tl.store(parts, sum_filter_past, mask=square)
        tl.store(parts + 1, sum_filter_now, mask=square)
        tl.store(parts + 2 * C * C, sum_gate_past, mask=square)
        tl.store(parts + 2 * C * C + 1, sum_gate_now, mask=square)
        tl.store(bias_parts_ptr + program * 2 * C + c, sum_filter_bias, mask=inside)
        tl.store(bias_parts_ptr + program * 2 * C + C + c, sum_gate_bias, mask=inside)
