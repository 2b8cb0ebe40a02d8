// Logarithms of second moments: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

static inline float log_step(int32_t low, int32_t high) {
    const float step = float(high - low) * float(1.0 / 254.0);
    return step < 2048.0f ? 2048.0f : step;
}

static inline void log_dequantize(const uint8_t* __restrict codes, const float* scales, float* __restrict x) {
    const int32_t low = as_bits(scales[0]), high = as_bits(scales[1]);
    const float step = log_step(low, high);
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const int32_t code = codes[i], bits = low + rounded((float(code) - 1.0f) * step);
        x[i] = as_float(chosen(mask(code == 255), high, bits) & mask(code > 0));
    }
}

// Replaces x by its dequantized values. The bits of a positive number, read as int32, are positive; others are not.
static inline void log_quantize(uint8_t* __restrict codes, float* scales, float* __restrict x, int64_t index, int64_t t) {
    int32_t bits[BLOCK], up[BLOCK], high = 0;
    uint32_t least = UINT32_MAX;  // minus one, so that 0 becomes the largest uint32
    float level[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        bits[i] = as_bits(x[i]) & mask(uint32_t(as_bits(x[i])) < 0x7f800000u);
        high = larger(high, bits[i]);
        least = least < uint32_t(bits[i]) - 1u ? least : uint32_t(bits[i]) - 1u;
    }
    const int32_t low = larger(int32_t(least + 1u), smaller(high, larger(high - (40 << 23), 1)));
    const float step = log_step(low, high), inverse = 1.0f / step;
    const int32_t span = rounded(float(high - low));
    for (int i = 0; i < BLOCK; ++i) {
        const float found = float(bits[i] - low) * inverse;
        level[i] = found < 0.0f ? 0.0f : found;  // values below the lowest level are raised to it
    }
    const uint32_t half = BLOCK / 2, first = uint32_t(index / 2), key = uint32_t(t);
    for (uint32_t i = 0; i < half; ++i) {
        const uint32_t random = hash(key, first + i);
        up[i] = int32_t(fused(whole(random & 0xffffu), 1.52587890625e-5f, level[i]));
        up[i + half] = int32_t(fused(whole(random >> 16), 1.52587890625e-5f, level[i + half]));
    }
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t near = rounded(level[i]), snaps = mask(absolute(level[i] - float(near)) < 0.0009765625f);
        const int32_t whole = smaller(chosen(snaps, near, up[i]), 254), above = rounded(float(whole) * step);
        const int32_t last = mask((above >= span) | (bits[i] >= high)), some = mask(bits[i] > 0);
        x[i] = as_float(chosen(last, high, low + above) & some);
        bits[i] = ((whole + 1) | last) & some;
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(bits[i]);  // apart: a loop with bytes is vectorized by 32
    scales[0] = as_float(low);
    scales[1] = as_float(high);
}
