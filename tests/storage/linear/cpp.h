static inline void linear_dequantize(const uint8_t* codes, const float* scales, float* x, float steps) {
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = (float(codes[i]) - 128.0f) / steps * scales[0];
}

static inline void linear_quantize(uint8_t* codes, float* scales, const float* x, float steps) {
    float scale = 0.0f;
    for (int64_t i = 0; i < BLOCK; ++i) scale = maximum(scale, absolute(x[i]));
    for (int64_t i = 0; i < BLOCK; ++i) codes[i] = uint8_t(rounded(x[i] / (scale > 0.0f ? scale : 1.0f) * steps) + 128);
    scales[0] = scale;
}
