// First moments relative to the root of the second: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

static inline float ratio_root(float v) { return as_float(0x20000000 + ((as_bits(v) & 0x7f000000) >> 1)); }

// The reciprocal, but 0 for 0.
static inline float ratio_per_root(float v) {
    return as_float((0x5f000000 - ((as_bits(v) & 0x7f000000) >> 1)) & mask(as_bits(v) > 0));
}

static inline void ratio_dequantize(
    const uint8_t* __restrict codes, const float* scales, float* __restrict x, const float* __restrict partner) {
    const float scale = scales[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = curve_value<18>(codes[i], scale) * ratio_root(partner[i]);
}

static inline void ratio_quantize(
    uint8_t* __restrict codes, float* scales, const float* __restrict x, const float* __restrict partner) {
    float ratio[BLOCK];
    int32_t largest = 0;  // positive numbers have the order of their bits
    for (int i = 0; i < BLOCK; ++i) {
        ratio[i] = as_float(as_bits(x[i]) & mask(absolute(x[i]) < 0x1p127f)) * ratio_per_root(partner[i]);
        largest = larger(largest, as_bits(absolute(ratio[i])));
    }
    curve_codes<18>(codes, scales, ratio, largest);
}
