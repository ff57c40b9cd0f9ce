"""Device helpers shared by the kernels. Derivations: README.md beside this file."""

import triton
import triton.language as tl


@triton.jit
def _aligned_extents(M, C, S, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """M, C, S unchanged, but with the alignment of the contiguous one visible to the compiler.

    The integers are not specialised on (that would compile a variant a shape); the multiplication shows the
    compiler what it needs for 128-bit accesses.
    """
    if CHANNELS_LAST:
        C = C // ALIGN * ALIGN
    else:
        M = M // ALIGN * ALIGN
        S = S // ALIGN * ALIGN
    return M, C, S


@triton.jit
def _tile_offsets(row0, offs_c, C, S, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where the rows from ``row0`` (int64) on and the channels ``offs_c`` are: a scalar base and [BLOCK_M, BLOCK_C].

    The base is apart because the offsets from it fit 32 bits in channels-last, which halves their registers.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        base = row0 * C
        offsets = offs_m[:, None] * C + offs_c[None, :]
    else:
        n0 = row0 // S
        s = (row0 - n0 * S).to(tl.int32) + offs_m
        base = n0 * C * S
        offsets = ((s // S).to(tl.int64) * C)[:, None] * S + (offs_c[None, :].to(tl.int64) * S + (s % S)[:, None])
    return base, offsets


@triton.jit
def _load_sum(x_ptr, residual_ptr, s_ptr, base, offsets, mask, ADD: tl.constexpr):
    """One tile of x in float32; with ADD, of s = x + residual, which is stored.

    s is rounded like what is stored, so that those who read it again compute with the same values.
    """
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        s = (x + residual).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + base + offsets, s, mask=mask)
        x = s.to(tl.float32)
    return x


@triton.jit
def _mask_offsets(row0, offs_c, M, C, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Byte offsets [BLOCK_M / 8, BLOCK_C] into the 1-bit mask, and which of them exist."""
    bytes_m = (M + 7) // 8
    offs_b = row0 // 8 + tl.arange(0, BLOCK_M // 8)
    valid = (offs_b < bytes_m)[:, None] & (offs_c < C)[None, :]
    if CHANNELS_LAST:
        offsets = offs_b[:, None] * C + offs_c[None, :]
    else:
        offsets = offs_c[None, :].to(tl.int64) * bytes_m + offs_b[:, None]
    return offsets, valid


@triton.jit
def _pack_bits(keep, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, BLOCK_C] of bool to [BLOCK_M / 8, BLOCK_C] bytes; bit i of a byte is its row i."""
    shift = tl.arange(0, 8)[None, :, None]
    bits = tl.reshape(keep.to(tl.int32), [BLOCK_M // 8, 8, BLOCK_C]) << shift
    return tl.sum(bits, axis=1).to(tl.uint8)


@triton.jit
def _unpack_bits(packed, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inverse of ``_pack_bits``."""
    shift = tl.arange(0, 8)[None, :, None]
    bits = (packed.to(tl.int32)[:, None, :] >> shift) & 1
    return tl.reshape(bits, [BLOCK_M, BLOCK_C]) != 0


@triton.jit
def _normalise(x_centred, scale, shift):
    """(x − mean)·(rstd·γ) + β. One explicit fma, so that forward and backward round alike: the backward finds
    the sign of the pre-activation again from x."""
    return tl.fma(x_centred, scale[None, :], shift[None, :])


@triton.jit
def _positive(z, dtype: tl.constexpr):
    """Where ReLU keeps z after the cast to ``dtype``: not (z <= 0), so NaN is kept, as in PyTorch."""
    return (z.to(dtype).to(tl.float32) <= 0) == 0


@triton.jit
def _sum_rows(x):
    """Sum over axis 0; of many rows by groups of 16, so that rounding errors grow with their square root only.

    A GPU's reduction is a tree in any case; the interpreter adds one row after the other. The 128 rows of a looping
    channels-last tile are left alone: there the grouping was seen to double the registers of the statistics kernel.
    """
    if x.shape[0] > 128:
        x = tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), axis=1)
        if x.shape[0] > 64:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def _chan_merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """The moments of two disjoint samples from those of each (Chan et al., 1983); empty ones may occur."""
    count = count_a + count_b
    weight = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * weight, m2_a + m2_b + delta * (delta * (count_a * weight))


@triton.jit
def _average(x, count, total):
    """Sum over axis 0 of x [R, C], over ``total``, refined once by the same of the deviations count·average.

    A single sum rounds in proportion to the average; the deviations are smaller and of either sign.
    """
    average = _sum_rows(x) / total
    return average + _sum_rows(x - count * average[None, :]) / total


@triton.jit
def _moments(count, mean, m2):
    """(mean, biased variance) of all samples: Chan's formula over axis 0 of count [R, 1], mean and m2 [R, C]."""
    total = tl.sum(count, axis=0)
    mean_c = _sum_rows(count * mean) / total
    # As in _average, but of differences, which are exact: count·mean has been rounded.
    mean_c += _sum_rows(count * (mean - mean_c[None, :])) / total
    spread = mean - mean_c[None, :]
    return mean_c, _average(m2 + spread * (count * spread), count, total)


@triton.jit
def _row_moments(z, mask_n, N, EPS: tl.constexpr):
    """(mean, rstd) of the rows of z [R, C], of which the columns ``mask_n`` exist; two passes over registers."""
    total = N.to(tl.float32)
    mean = tl.sum(z, axis=1) / total
    mean += tl.sum(tl.where(mask_n[None, :], z - mean[:, None], 0.0), axis=1) / total  # refined, as in _average
    centred = tl.where(mask_n[None, :], z - mean[:, None], 0.0)
    return mean, _rstd(tl.sum(centred * centred, axis=1) / total, EPS)


@triton.jit
def _rstd(var, EPS: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(var + EPS))


@triton.jit
def _load_vector(vector_ptr, offsets, mask, default):
    """A vector of parameters in float32; ``default`` everywhere where there is none."""
    vector = tl.full(offsets.shape, default, dtype=tl.float32)
    if vector_ptr is not None:
        vector = tl.load(vector_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return vector


@triton.jit
def _sum_partials(partials_ptr, offs_n, mask_n, N, programs, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sum over all programs of partials [programs, N], always in the same order."""
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < programs)[:, None] & mask_n[None, :]
        # .cg: other multiprocessors wrote these; not from this one's L1
        total += tl.load(
            partials_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
    return _sum_rows(total)


@triton.jit
def _arrive(counter_ptr):
    """How many programs had arrived before this one, with what they stored visible afterwards.

    The atomic is issued by one thread: without the barrier the other threads' stores could follow it.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
