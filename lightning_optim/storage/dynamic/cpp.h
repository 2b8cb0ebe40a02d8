// Dynamic tree quantization: the functions of __init__.py for one block.
// Values that are not finite are stored as zero. Values beyond the end of a tensor are zero already.

static inline void dynamic_dequantize(
    const uint8_t* __restrict codes, const float* scales, float* __restrict x, const float* __restrict codebook, bool) {
    const float scale = scales[0];
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = codebook[codes[i]] * scale;
}

// The 256 entries of the codebook are followed by the table of `searchable` in __init__.py: for each cell the number of
// codes that begin below it, and then for each cell the smallest number of the next code.
static constexpr int32_t CELLS = 2945, NEAREST_CELL = 13312;

static inline void dynamic_quantize(
    uint8_t* __restrict codes, float* scales, float* __restrict x, const float* __restrict codebook, bool is_signed) {
    const int32_t* __restrict below = (const int32_t*)codebook + 256;
    const float* __restrict begins = codebook + 256 + 2 * CELLS;
    int32_t found[BLOCK], most = 0, first = BLOCK - 1;
    for (int i = 0; i < BLOCK; ++i) x[i] = as_float(as_bits(x[i]) & mask(absolute(x[i]) < 0x1p127f));
    for (int i = 0; i < BLOCK; ++i) most = larger(most, as_bits(absolute(x[i])));
    for (int i = 0; i < BLOCK; ++i) first = smaller(first, as_bits(absolute(x[i])) == most ? i : int(BLOCK) - 1);
    const float scale = x[first], base = scale != 0.0f ? scale : 1.0f;
#pragma GCC ivdep
    for (int i = 0; i < BLOCK; ++i) {
        const float z = x[i] / base;
        const int32_t cell = larger((as_bits(absolute(z)) >> 16) - NEAREST_CELL, 0) + (CELLS & mask(z < 0.0f));
        const int32_t code = below[cell] + int32_t(z >= begins[cell]);
        found[i] = larger(code, int32_t(x[i] > 0.0f) & int32_t(!is_signed));
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(found[i]);
    scales[0] = scale;
}
