// Signed values relative to the largest of their block: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

#ifndef CURVE
#define CURVE

static constexpr int32_t ORIGIN = 0x40000000;
static constexpr float curve_width(int shift) { return shift == 18 ? 29.5f : 494.0f; }

template <int SHIFT> static inline float curve_value(int32_t code, float scale) {
    const float size = (as_float(((code & 127) << SHIFT) + ORIGIN) - 2.0f) * (1.0f / curve_width(SHIFT)) * scale;
    return as_float(as_bits(size) | int32_t(uint32_t(code & 128) << 24));
}

// The codes of finite values, whose largest size has the bits `largest`.
template <int SHIFT>
static inline void curve_codes(uint8_t* __restrict codes, float* scales, const float* __restrict x, int32_t largest) {
    const bool some = as_float(largest) > 0x1p-118f && largest < 0x7f800000;
    const float scale = some ? as_float(largest) : 0.0f, per_scale = some ? 1.0f / (scale * 0.25f) * (curve_width(SHIFT) * 0.25f) : 0.0f;
    int32_t found[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t size = (as_bits(absolute(x[i]) * per_scale + 2.0f) + (1 << (SHIFT - 1))) >> SHIFT;
        found[i] = size | ((as_bits(x[i]) >> 24) & 128);
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(found[i]);  // apart: a loop with bytes is vectorized by 32
    scales[0] = scale;
}

static inline void curve_dequantize(const uint8_t* __restrict codes, const float* scales, float* __restrict x) {
    const float scale = scales[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = curve_value<19>(codes[i], scale);
}

static inline void curve_quantize(uint8_t* __restrict codes, float* scales, float* __restrict x) {
    int32_t largest = 0;  // positive numbers have the order of their bits
    for (int i = 0; i < BLOCK; ++i) {
        x[i] = as_float(as_bits(x[i]) & mask(absolute(x[i]) < 0x1p127f));
        largest = larger(largest, as_bits(absolute(x[i])));
    }
    curve_codes<19>(codes, scales, x, largest);
}

#endif
