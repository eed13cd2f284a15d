"""The operations of library `resnet50` in plain PyTorch: what each one means, on any device, and what it accepts.

The int8 formula is csrc/README.md's. Every operation has a check of its arguments, which comes before the operation
and before its fake kernel, and returns the shape of the result, or None where only running tells. Activations are
(N, C, H, W) in channels_last memory.
"""
import torch
from torch.nn import functional as F

MULT_BITS = 22  # y = acc * mult / 2^22
MAX_GAIN = 2 ** 15
GATE_BITS = 12  # a gate is an integer / 2^12
FLOATS = torch.float32, torch.bfloat16, torch.float16  # the last on CUDA only, where there are kernels
BLOCK_2_4 = 640  # bytes in which pack_2_4 has 16 output channels and 64 of k
MAX_NUMEL = 2 ** 31  # the kernels address the pixels of a batch with int32
MAX_RESIZED = 2 ** 28  # pixels of a resized box, whole, which is what PyTorch makes of it before the crop


# ------------------------------------------------------------------------------------------------------ checks

def expect(op, dtypes, shape, device=None, most=MAX_NUMEL, **tensors):
    """Of each of the tensors; None is one that was not given. `shape` holds numbers, and names for free sizes. Memory
    is channels_last for 4 dimensions, else contiguous."""
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    kind = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    sizes = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.dtype in dtypes and tensor.dim() == len(shape) and device in (None, tensor.device) and all(
            size > 0 if isinstance(want, str) else size == want for size, want in zip(tensor.shape, shape))
        refuse(not fits, f"{op}: {name} must be {kind} {sizes} on {device or 'any device'} and not empty, "
                         f"got {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}")
        refuse(not is_dense(tensor, layout),
               f"{op}: {name} must be {str(layout).removeprefix('torch.').removesuffix('_format')}, expected {sizes}, "
               f"got strides {tensor.stride()}")
        refuse(tensor.numel() >= most, f"{op}: {name} must have fewer than 2^31 elements, got {tuple(tensor.shape)}")


def is_dense(tensor, layout):
    """is_contiguous(), which PyTorch 2.11 denies of what it traces with a free batch size"""
    stride = 1
    for d in (1, 3, 2, 0) if layout == torch.channels_last else reversed(range(tensor.dim())):
        if tensor.stride(d) != stride and tensor.shape[d] != 1:
            return False
        stride *= tensor.shape[d]
    return True


def refuse(bad, message):
    if bad:
        raise RuntimeError(message)


def check_steps(op, stride, padding, groups=1):
    refuse(len(stride) != 2 or len(padding) != 2 or min(stride) < 1 or min(padding) < 0 or groups < 1,
           f"{op}: stride {list(stride)}, padding {list(padding)}, groups {groups}; expected two numbers from 1, two "
           "from 0, and one from 1")
    refuse(max(stride) >= 2 ** 31 or max(padding) >= 2 ** 30,
           f"{op}: stride {list(stride)}, padding {list(padding)}: the stride and the padded x must fit int32")


def windows(op, x, kernel, stride, padding):
    """How many there are in x (N, C, H, W) -> Ho, Wo"""
    size = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    refuse(min(size) < 1, f"{op}: x is {tuple(x.shape)}; expected at least {tuple(kernel)} pixels with the padding "
                          f"{list(padding)} around them")
    return size


def conv_size(op, x, weight, stride, padding, groups):
    """(N, C, H, W) by (O, C / groups, kh, kw) -> (N, O, Ho, Wo)"""
    check_steps(op, stride, padding, groups)
    refuse(x.shape[1] % groups or weight.shape[0] % groups,
           f"{op}: {x.shape[1]} input and {weight.shape[0]} output channels; expected multiples of groups={groups}")
    expect(op, weight.dtype, ("O", x.shape[1] // groups, "kh", "kw"), x.device, weight=weight)
    return x.shape[0], weight.shape[0], *windows(op, x, weight.shape[2:], stride, padding)


def check_sums(op, d, size, mult, bias, residual, gain, x2, weight2, stride2):
    """What joins the sums of a convolution with a result of this size, and what they are multiplied by"""
    refuse((residual is None) != (gain is None), f"{op}: expected residual and gain together, or neither")
    refuse((x2 is None) != (weight2 is None), f"{op}: expected x2 and weight2 together, or neither")
    expect(op, torch.int32, (size[1],), d, mult=mult, bias=bias, gain=gain)
    expect(op, torch.uint8, size, d, residual=residual)
    if x2 is not None:
        expect(op, torch.uint8, (size[0], "C2", "H2", "W2"), d, x2=x2)
        check_steps(op, stride2, (0, 0))
        reached = windows(op, x2, (1, 1), stride2, (0, 0))
        refuse(reached != [*size[2:]], f"{op}: x2 {tuple(x2.shape)} with stride2 {list(stride2)} gives {reached}; "
                                       f"expected {tuple(size)}")


def check_conv_int8(x, weight, mult, bias, residual=None, gain=None, x2=None, weight2=None, pad_value=None,
                    stride=(1, 1), padding=(0, 0), stride2=(1, 1), groups=1):
    op, d = "conv_int8", x.device
    expect(op, torch.uint8, ("N", "C", "H", "W"), x=x)
    expect(op, torch.int8, ("O", "C / groups", "kh", "kw"), d, weight=weight)
    size = conv_size(op, x, weight, stride, padding, groups)
    refuse(x2 is not None and groups != 1, f"{op}: x2 goes with groups 1, got {groups}")
    check_sums(op, d, size, mult, bias, residual, gain, x2, weight2, stride2)
    expect(op, torch.uint8, (x.shape[1],), d, pad_value=pad_value)
    expect(op, torch.int8, (size[1], x2.shape[1] if x2 is not None else "C2", 1, 1), d, weight2=weight2)
    return size


def check_conv_int8_2_4(x, weight, mult, bias, kernel, residual=None, gain=None, x2=None, weight2=None, stride=(1, 1),
                        padding=(0, 0), stride2=(1, 1)):
    op, d = "conv_int8_2_4", x.device
    expect(op, torch.uint8, ("N", "C", "H", "W"), x=x)
    expect(op, torch.int32, ("O",), d, mult=mult)
    refuse(len(kernel) != 2 or min(kernel) < 1, f"{op}: kernel {list(kernel)}; expected two numbers from 1")
    check_steps(op, stride, padding)
    size = x.shape[0], mult.shape[0], *windows(op, x, kernel, stride, padding)
    check_sums(op, d, size, mult, bias, residual, gain, x2, weight2, stride2)
    for name, packed, pixels, taps in (("weight", weight, x, kernel[0] * kernel[1]), ("weight2", weight2, x2, 1)):
        if packed is not None:
            refuse(pixels.shape[1] % 16,
                   f"{op}: x and x2 must have multiples of 16 channels (N, C, H, W), got {tuple(pixels.shape)}")
            expect(op, torch.uint8, (-(-size[1] // 16), -(-taps * pixels.shape[1] // 64), BLOCK_2_4), d,
                   **{name: packed})
            refuse(packed.storage_offset() % 16, f"{op}: {name} must begin at a multiple of 16 bytes")
    return size


def check_gemm_int8(a, b, bias=None, mult=None, scale=None):
    op, d = "gemm_int8", a.device
    expect(op, torch.uint8, ("M", "K"), a=a)
    expect(op, torch.int8, ("N", a.shape[1]), d, b=b)
    refuse(mult is not None and scale is not None, f"{op}: expected mult or scale or neither, not both")
    expect(op, torch.int32, (b.shape[0],), d, bias=bias, mult=mult)
    expect(op, torch.float32, (b.shape[0],), d, scale=scale)
    return a.shape[0], b.shape[0]


def check_max_pool_int8(x, kernel, stride, padding):
    op = "max_pool_int8"
    expect(op, torch.uint8, ("N", "C", "H", "W"), x=x)
    refuse(kernel < 1 or stride < 1 or not 0 <= 2 * padding <= kernel,
           f"{op}: kernel {kernel}, stride {stride}, padding {padding}; expected two numbers from 1, and one from 0 to "
           "half the kernel")
    size = [(x.shape[i] + 2 * padding - kernel) // stride + 1 for i in (2, 3)]
    refuse(min(size) < 1, f"{op}: x is {tuple(x.shape)}; expected at least {kernel} pixels with the padding {padding}")
    return *x.shape[:2], *size


def check_avg_pool_int8(x, mult):
    expect("avg_pool_int8", torch.uint8, ("N", "C", "H", "W"), x=x)
    expect("avg_pool_int8", torch.int32, (1,), x.device, mult=mult)
    return x.shape[:2]


def check_gate_int8(x, residual, weight1, bias1, weight2, bias2, scales, zeros):
    op, d, maps = "gate_int8", x.device, 2 if residual is None else 1
    expect(op, torch.uint8, ("N", "C", "H", "W"), x=x)
    refuse(x.shape[1] % maps, f"{op}: x must be (N, 2 C, H, W) without a residual, got {x.shape[1]} channels")
    c, inner = x.shape[1] // maps, len(weight1)
    expect(op, torch.uint8, tuple(x.shape), d, residual=residual)
    expect(op, torch.float32, ("inner", c), d, weight1=weight1)
    expect(op, torch.float32, (maps * c, inner), d, weight2=weight2)
    expect(op, torch.float32, (inner,), d, bias1=bias1)
    expect(op, torch.float32, (maps * c,), d, bias2=bias2)
    expect(op, torch.float64, (3,), d, scales=scales)
    expect(op, torch.int32, (2,), d, zeros=zeros)
    return x.shape[0], c, *x.shape[2:]


def check_jpeg_sizes(files, places):
    for file in files:
        expect("jpeg_sizes", torch.uint8, ("bytes",), most=2 ** 63, files=file)
    expect("jpeg_sizes", torch.int64, ("N", 3), places=places)
    return len(places), 2


def check_jpeg_restart(file, pixels):
    expect("jpeg_restart", torch.uint8, ("bytes",), file=file)
    refuse(pixels < 1, f"jpeg_restart: pixels must be positive, got {pixels}")


def check_crop_images(out, files, places, sizes, crops, kernel, gap):
    op, n = "crop_images", len(out)
    expect(op, torch.uint8, ("N", 3, "H", "W"), out=out)
    for file in files:
        expect(op, torch.uint8, ("bytes",), most=2 ** 63, files=file)
    expect(op, torch.int64, (n, 3), places=places)
    expect(op, torch.int64, (n, 2), sizes=sizes)
    expect(op, torch.int64, (n, 9), crops=crops)
    refuse(kernel not in ("bilinear", "bicubic"), f"{op}: kernel must be bilinear or bicubic, got {kernel}")
    refuse(gap < 0, f"{op}: gap must not be negative, got {gap}")
    return n,


def check_pack_int8(weight, mult, bias, gain=None, weight2=None, winograd=False):
    op, d = "pack_int8", weight.device
    expect(op, torch.int8, ("O", "C", "kh", "kw"), weight=weight)
    expect(op, torch.int32, (weight.shape[0],), d, mult=mult, bias=bias, gain=gain)
    expect(op, torch.int8, (weight.shape[0], "C2", 1, 1), d, weight2=weight2)


def check_pack_float(weight, bias, weight2=None, winograd=False):
    op, d = "pack_float", weight.device
    expect(op, FLOATS[:2], ("O", "C", "kh", "kw"), weight=weight)
    expect(op, torch.float32, (weight.shape[0],), d, bias=bias)
    expect(op, weight.dtype, (weight.shape[0], "C2", 1, 1), d, weight2=weight2)


def check_network(op, pixels, plan, classes):
    expect(op, torch.uint8, ("N", 3, "H", "W"), pixels=pixels)
    expect(op, torch.uint8, ("bytes",), pixels.device, plan=plan)
    return None if op == "network_profile" else (pixels.shape[0], classes)


def check_conv_bn_relu(x, weight, scale, bias, residual=None, relu=True, stride=(1, 1), padding=(0, 0), groups=1):
    op, d = "conv_bn_relu", x.device
    expect(op, FLOATS, ("N", "C", "H", "W"), x=x)
    expect(op, x.dtype, ("O", "C / groups", "kh", "kw"), d, weight=weight)
    size = conv_size(op, x, weight, stride, padding, groups)
    expect(op, torch.float32, (size[1],), d, scale=scale, bias=bias)
    expect(op, x.dtype, size, d, residual=residual)
    return size


def check_bn_relu(x, weight, bias, residual, eps, relu):
    expect("bn_relu", FLOATS, ("N", "C", "H", "W"), x=x)
    expect("bn_relu", torch.float32, (x.shape[1],), x.device, weight=weight, bias=bias)
    expect("bn_relu", x.dtype, tuple(x.shape), x.device, residual=residual)
    return x.shape


def check_bn_relu_backward(grad, y, x, weight, mean, invstd, relu, residual):
    expect("bn_relu_backward", FLOATS, ("N", "C", "H", "W"), x=x)
    expect("bn_relu_backward", x.dtype, tuple(x.shape), x.device, grad=grad, y=y)
    expect("bn_relu_backward", torch.float32, (x.shape[1],), x.device, weight=weight, mean=mean, invstd=invstd)
    return x.shape


def check_values(op, weights, bias, mult=None, gain=None):
    """What only the numbers can tell: no accumulator leaves int32 whatever the pixels are, mult and gain are in range.
    weights: int8 (O, ...) each; the others int32 (O)."""
    low, high = bias.long(), bias.long()
    for weight in weights:
        wide = weight.long().flatten(1)
        low, high = low + 255 * wide.clamp(max=0).sum(1), high + 255 * wide.clamp(min=0).sum(1)
    if gain is not None:
        refuse(((gain < -MAX_GAIN) | (gain >= MAX_GAIN)).any(),
               f"{op}: gain from {gain.min()} to {gain.max()}; expected -2^15 <= gain < 2^15")
        low, high = low + 255 * gain.long().clamp(max=0), high + 255 * gain.long().clamp(min=0)
    if mult is not None:
        refuse(((mult < 0) | (mult > 2 ** MULT_BITS)).any(),
               f"{op}: mult from {mult.min()} to {mult.max()}; expected 0 <= mult <= 2^22")
    refuse((low < -2 ** 31).any() or (high >= 2 ** 31).any(),
           f"{op}: an accumulator could reach {max(high.max(), -low.min())}, which is outside int32; expected "
           "bias + 255 * (sum of the weights of one sign, and of gain) inside it")


# -------------------------------------------------------------------------------------------------- operations

def per_channel(values, like):
    """(C) -> a view that broadcasts along dimension 1 of `like`"""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def nhwc(values, dtype):
    """-> a new channels_last tensor; never an alias, which an operation must not return"""
    return torch.empty(values.shape, dtype=dtype, device=values.device, memory_format=torch.channels_last).copy_(values)


def requantize(acc, mult):
    """int64 (N, C, ...), int32 (C) -> int64 in 0..255: clamp(RNE(mult * acc / 2^22)), half to even"""
    product = acc * per_channel(mult.long(), acc)  # at most 2^53
    half = 1 << (MULT_BITS - 1)
    y, rest = product >> MULT_BITS, product & (2 * half - 1)
    return (y + ((rest > half) | ((rest == half) & (y % 2 == 1)))).clamp_(0, 255)


def conv_int8(x, weight, mult, bias, residual=None, gain=None, x2=None, weight2=None, pad_value=None,
              stride=(1, 1), padding=(0, 0), stride2=(1, 1), groups=1):
    """x uint8 (N, C, H, W), weight int8 (O, C / groups, kh, kw), mult and bias int32 (O) -> uint8 (N, O, Ho, Wo).
    residual uint8, as the result, times gain int32 (O), and the 1x1 convolution of x2 uint8 (N, C2, H2, W2) by weight2
    int8 (O, C2, 1, 1) with stride2, join the accumulator. pad_value uint8 (C) lies around x, else 0."""
    check_values("conv_int8", [weight] if weight2 is None else [weight, weight2], bias, mult, gain)
    n, c, h, w = x.shape
    (top, left), wide = padding, dict(dtype=torch.float64, device=x.device)
    padded = torch.zeros(n, c, h + 2 * top, w + 2 * left, **wide)
    if pad_value is not None:
        padded += per_channel(pad_value, x)
    padded[:, :, top:top + h, left:left + w] = x
    acc = F.conv2d(padded, weight.double(), stride=stride, groups=groups)  # float64 sums of integers are exact ...
    if x2 is not None:
        acc += F.conv2d(x2.double(), weight2.double(), stride=stride2)
    acc = acc.round_().long() + per_channel(bias, acc)  # ... and rounded for devices that convolve by transforms
    if residual is not None:
        acc += per_channel(gain, acc).long() * residual
    return nhwc(requantize(acc, mult), torch.uint8)


def pack_2_4(weight):
    """int8 (O, C, kh, kw) NHWC -> uint8 (O / 16, kh kw C / 64, 640), both rounded up; None where more than two of four
    channels that follow each other are not zero, or C is no multiple of 16. A block is what a warp multiplies by at
    once (m16n8k64 in the PTX manual): for each lane 4 g + m the 16 bytes that are kept of rows g and g + 8, then for
    each a word with the places of 16, 2 bits each: row g + 8 (m % 2), for the half m / 2 of k."""
    o, c = weight.shape[:2]
    if c % 16:
        return None
    rows = weight.permute(0, 2, 3, 1).reshape(o, -1)
    rows = F.pad(rows, (0, -rows.shape[1] % 64, 0, -o % 16))
    fours = rows.view(*(rows.shape[0] // 16, 2, 8), rows.shape[1] // 64, 16, 4)  # blocks, i, g of rows; of k
    if ((fours != 0).sum(-1) > 2).any():
        return None
    order = (fours == 0).to(torch.uint8).argsort(dim=-1, stable=True)
    places = order[..., :2].sort(-1).values  # the first zeros fill up
    kept = fours.gather(-1, places).flatten(-2).unflatten(-1, (2, 4, 4))  # k in halves, m, bytes
    kept = kept.permute(0, 3, 2, 5, 4, 1, 6).flatten(2)  # blocks of rows and of k; g, m, half, i, byte
    words = (places[..., 0] + 4 * places[..., 1]).unflatten(-1, (2, 4, 2))  # k in halves, bytes, their two halves
    words = (words[..., 0] + 16 * words[..., 1]).permute(0, 3, 2, 4, 1, 5).flatten(2)  # g, half, i, byte
    return torch.cat([kept.view(torch.uint8), words.to(torch.uint8)], 2)


def unpack_2_4(packed, o, c, kernel):
    """-> int8 (O, C, kh, kw), of which pack_2_4 makes this"""
    blocks, steps = packed.shape[:2]
    kept = packed[:, :, :512].view(torch.int8).unflatten(2, (8, 4, 2, 2, 4)).permute(0, 5, 2, 1, 4, 3, 6)
    kept = kept.reshape(blocks * 16, steps * 16, 2)
    words = packed[:, :, 512:].unflatten(2, (8, 2, 2, 4)).permute(0, 4, 2, 1, 3, 5).reshape(blocks * 16, steps * 8)
    fours = torch.stack([words & 15, words >> 4], 2).flatten(1)
    rows = torch.zeros(*fours.shape, 4, dtype=torch.int8, device=packed.device)
    rows.scatter_(2, torch.stack([fours & 3, fours >> 2], 2).long(), kept)
    rows = rows.flatten(1)[:o, :kernel[0] * kernel[1] * c]
    return rows.reshape(o, *kernel, c).permute(0, 3, 1, 2)


def conv_int8_2_4(x, weight, mult, bias, kernel, residual=None, gain=None, x2=None, weight2=None, stride=(1, 1),
                  padding=(0, 0), stride2=(1, 1)):
    """conv_int8, whose weight (O, C, *kernel) and weight2 (O, C2, 1, 1) pack_2_4 has packed."""
    weight = unpack_2_4(weight, len(mult), x.shape[1], kernel)
    weight2 = None if x2 is None else unpack_2_4(weight2, len(mult), x2.shape[1], (1, 1))
    return conv_int8(x, weight, mult, bias, residual, gain, x2, weight2, None, stride, padding, stride2)


def gemm_int8(a, b, bias=None, mult=None, scale=None):
    """a uint8 (M, K), b int8 (N, K), bias int32 (N) -> a b^T + bias (M, N): int32 as it is; with mult int32 (N)
    requantized to uint8; with scale float32 (N) times that, as float32."""
    bias = torch.zeros(len(b), dtype=torch.int32, device=a.device) if bias is None else bias
    check_values("gemm_int8", [b], bias, mult)
    acc = (a.double() @ b.double().T).round_().long() + bias
    if mult is not None:
        return requantize(acc, mult).to(torch.uint8)
    return acc.int() if scale is None else (acc.double() * scale.double()).float()


def max_pool_int8(x, kernel, stride, padding):
    """uint8 (N, C, H, W) -> uint8 (N, C, Ho, Wo): maxima of square windows."""
    return nhwc(F.max_pool2d(x.float(), kernel, stride, padding), torch.uint8)


def avg_pool_int8(x, mult):
    """uint8 (N, C, H, W), mult int32 (1) -> uint8 (N, C), the sum over H and W requantized by mult / (H W), rounded."""
    pixels = x.shape[2] * x.shape[3]
    return requantize(x.sum((2, 3), dtype=torch.int64), (mult + pixels // 2) // pixels).to(torch.uint8)


def gate_int8(x, residual, weight1, bias1, weight2, bias2, scales, zeros):
    """Attention between uint8 maps, which stand for scale * (value - zero): gates, one per image and channel, come from
    float64, are rounded to integers / 2^12, and from there on everything is exact (in float32 below 2^24, which is why
    the first two scales together are at most 16 times the result's, the third).

    squeeze-and-excitation  x (N, C, H, W), residual the same -> relu(gate(x) * x + residual)
    split attention         x (N, 2 C, H, W), two branches    -> gate(x) * branch a + (1 - gate(x)) * branch b

    gate: weight2 relu(weight1 mean + bias1) + bias2, float32 (C or 2 C, inner) and (inner, C), of the mean over H and W
    (split attention: of both branches' sum), through a sigmoid (split attention: of the difference of two such)."""
    mean = (x.double().mean((2, 3)) - zeros[0]) * scales[0]
    pooled = sum(mean.chunk(2, 1)) if residual is None else mean
    hidden = F.relu(F.linear(pooled, weight1.double(), bias1.double()))
    told = F.linear(hidden, weight2.double(), bias2.double())
    if residual is None:
        (first, second), maps = told.chunk(2, 1), x.chunk(2, 1)
        gates = (first - second).sigmoid(), (second - first).sigmoid()
    else:
        gates, maps = (told.sigmoid(), torch.ones_like(told)), (x, residual)
    acc = 0.0
    for value, gate, scale, zero in zip(maps, gates, scales[:2], zeros):
        factor = (gate * (scale / scales[2] * 2 ** GATE_BITS)).round_().float()[:, :, None, None]
        acc = acc + (value.float() - zero) * factor
    y = (acc / 2 ** GATE_BITS).round_().clamp_(0, 255).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last)  # not nhwc(), which would fix the size in a traced file


def jpeg_sizes(files, places):
    """Which JPEGs crop_images decodes: PyTorch itself none"""
    return torch.zeros_like(places[:, :2])


def jpeg_restart(file, pixels):
    """A JPEG file -> the same coefficients with restart markers about every `pixels` columns; empty if it is none"""
    return file[:0].clone()


def crop_images(out, files, places, sizes, crops, kernel, gap):
    """csrc.crop_images for pixels. PyTorch itself decodes no JPEG: those are not written. -> bool (N): which were"""
    done = torch.zeros(len(out), dtype=torch.bool)
    for i, ((which, offset, count), (h, w), crop) in enumerate(zip(*(t.tolist() for t in (places, sizes, crops)))):
        refuse(not 0 <= which < len(files) or min(offset, count) < 0 or offset + count > len(files[which]),
               f"crop_images: places[{i}] lies outside the {len(files)} files")
        top, left, height, width, full_h, full_w, row, column, flip = crop
        refuse(min(top, left, row, column) < 0 or min(height, width) < 1 or row + out.shape[2] > full_h
               or column + out.shape[3] > full_w or (h or w) and (h < 1 or w < 1 or count != h * w * 3 or
                                                                 top + height > h or left + width > w),
               f"crop_images: crops[{i}] does not fit its image or the size {tuple(out.shape[2:])}")
        if h and full_h * full_w <= MAX_RESIZED:
            box = files[which][offset:offset + count].view(1, h, w, 3)[:, top:top + height, left:left + width]
            made = F.interpolate(box.contiguous().permute(0, 3, 1, 2), (full_h, full_w), mode=kernel, antialias=True)
            made = made[..., row:row + out.shape[2], column:column + out.shape[3]]
            out[i:i + 1] = made.flip(3) if flip else made
            done[i] = True
    return done


def conv_bn_relu(x, weight, scale, bias, residual=None, relu=True, stride=(1, 1), padding=(0, 0), groups=1):
    """relu(conv(x, weight) * scale + bias + residual). x float32 or bfloat16 (N, C, H, W), weight (O, C / groups, kh,
    kw) and residual of the same type, scale and bias float32 (O); computed in float32, rounded to x's type once."""
    y = F.conv2d(x.float(), weight.float(), None, stride, padding, 1, groups)
    y = y * per_channel(scale, y) + per_channel(bias, y)
    y = y if residual is None else y + residual
    return nhwc(y.relu() if relu else y, x.dtype)


def bn_relu(x, weight, bias, residual, eps, relu):
    """Batch normalisation by the batch's own statistics (arXiv 1502.03167), then + residual, then ReLU, each if asked.
    x, residual (N, C, H, W), weight and bias (C) -> y, mean (C), invstd (C) = 1 / sqrt(biased variance + eps)."""
    wide = x.to(weight.dtype)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    invstd = (var + eps).rsqrt()
    y = (wide - per_channel(mean, x)) * per_channel(invstd * weight, x) + per_channel(bias, x)
    y = y if residual is None else y + residual
    return nhwc(y.relu() if relu else y, x.dtype), mean, invstd


def bn_relu_backward(grad, y, x, weight, mean, invstd, relu, residual):
    """grad of y, and what bn_relu took and gave -> gradients of x, of the residual (empty without one), weight, bias.
    Where a ReLU ran, the gradient passes where y is not <= 0: at a NaN too, as PyTorch's does."""
    g = grad.to(weight.dtype)
    g = torch.where(y <= 0, 0, g) if relu else g
    normal = (x.to(weight.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    dweight, dbias = (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    dx = (g - (per_channel(dbias, x) + normal * per_channel(dweight, x)) / count) * per_channel(invstd * weight, x)
    return nhwc(dx, x.dtype), nhwc(g, x.dtype) if residual else x.new_empty(0), dweight, dbias


OPERATIONS = {"conv_int8": (check_conv_int8, conv_int8), "conv_int8_2_4": (check_conv_int8_2_4, conv_int8_2_4),
              "gemm_int8": (check_gemm_int8, gemm_int8),
              "max_pool_int8": (check_max_pool_int8, max_pool_int8),
              "avg_pool_int8": (check_avg_pool_int8, avg_pool_int8),
              "gate_int8": (check_gate_int8, gate_int8),
              "jpeg_sizes": (check_jpeg_sizes, jpeg_sizes), "jpeg_restart": (check_jpeg_restart, jpeg_restart),
              "crop_images": (check_crop_images, crop_images),
              "conv_bn_relu": (check_conv_bn_relu, conv_bn_relu), "bn_relu": (check_bn_relu, bn_relu),
              "bn_relu_backward": (check_bn_relu_backward, bn_relu_backward)}
