// First moments relative to the root of the second: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

static inline float per_root(float v) { return as_float(0x5f400000 - (as_bits(v) >> 1)); }

static inline void ratio_dequantize(
    const uint8_t* __restrict codes, const float* scales, float* __restrict x, const float* __restrict partner) {
    const float scale = scales[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const float k = float(codes[i]) - 128.0f;
        x[i] = k * scale / (fused(-2.0f, absolute(k), 381.0f) * per_root(partner[i]));
    }
}

static inline void ratio_quantize(
    uint8_t* __restrict codes, float* scales, const float* __restrict x, const float* __restrict partner) {
    float ratio[BLOCK];
    int32_t largest = 0;  // positive numbers have the order of their bits
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t kept = mask((partner[i] > 0.0f) & (absolute(x[i]) < __builtin_inff()));
        ratio[i] = as_float(as_bits(x[i] * per_root(partner[i])) & kept);
        largest = larger(largest, as_bits(absolute(ratio[i])));
    }
    const float scale = from_bfloat16(to_bfloat16(as_float(largest))), base = scale > 0.0f ? scale : 1.0f;
    for (int i = 0; i < BLOCK; ++i) {
        const float code = 381.0f * ratio[i] / fused(2.0f, absolute(ratio[i]), base);
        ratio[i] = as_float(rounded(code) + 128);
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(as_bits(ratio[i]));
    scales[0] = scale;
}
