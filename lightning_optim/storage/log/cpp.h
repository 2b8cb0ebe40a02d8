// Logarithms of second moments: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

static constexpr int32_t LEVELS = 254, FINEST = 2048, COARSEST = 1321040;

static inline void log_dequantize(const uint8_t* __restrict codes, const float* scales, float* __restrict x) {
    const int32_t step = int32_t(scales[1]), base = as_bits(scales[0]) - step;
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const int32_t code = codes[i];
        x[i] = as_float((base + code * step) & mask(code > 0));
    }
}

// Replaces x by its dequantized values. The bits of a positive number, read as int32, are positive; others are not.
static inline void log_quantize(uint8_t* __restrict codes, float* scales, float* __restrict x, int64_t index, int64_t t) {
    int32_t bits[BLOCK], high = 0;
    uint32_t least = UINT32_MAX;  // minus one, so that 0 becomes the largest uint32
    for (int i = 0; i < BLOCK; ++i) {
        bits[i] = as_bits(x[i]) & mask(uint32_t(as_bits(x[i])) < 0x7f000000u);
        high = larger(high, bits[i]);
        least = least < uint32_t(bits[i]) - 1u ? least : uint32_t(bits[i]) - 1u;
    }
    const int32_t low = larger(int32_t(least + 1u), high - LEVELS * COARSEST), range = larger(high - low, LEVELS * FINEST);
    const float span = float(range), per_step = 1.0f / span * float(LEVELS);
    const int32_t step = rounded(span * float(1.0 / LEVELS)), base = low - step;
    const uint32_t first = dither_of(index, t);
    for (int i = 0; i < BLOCK; ++i) {
        const float level = float(larger(bits[i], low) - low) * per_step;
        const int32_t some = mask(bits[i] > 0), code = as_bits(level + dither(first, i) + 8388609.0f) & 255 & some;
        x[i] = as_float((base + code * step) & some);
        bits[i] = code;
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(bits[i]);  // apart: a loop with bytes is vectorized by 32
    scales[0] = as_float(low);
    scales[1] = float(step);
}
