// What printed kernels call: elementary functions, types of 16 bits, and 8-bit codes as in storage/.
//
// Loops are written so that a compiler turns them into vector instructions: no branch, no call, buffers that do not
// overlap. Sums and products stay apart (-ffp-contract=off) save where torch itself takes both in one rounding, so the
// numbers are those of torch.

#include <stdint.h>  // and nothing else: the headers of C++ would take longer than the rest

static constexpr int64_t BLOCK = 256;  // elements that share a header
static constexpr int64_t LANES = 16;   // partial sums that are kept side by side

// ------------------------------------------------------------------------------------------ functions

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
static inline float absolute(float x) { return __builtin_fabsf(x); }
static inline double absolute(double x) { return __builtin_fabs(x); }
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

template <class T> static inline T sign(T x) { return T(x > T(0)) - T(x < T(0)); }
template <class T> static inline T maximum(T a, T b) { return (a != a) | (a > b) ? a : b; }
template <class T> static inline T minimum(T a, T b) { return (a != a) | (a < b) ? a : b; }

// From the nearer end, in one rounding, as torch does it.
template <class T> static inline T lerp(T a, T b, T weight) {
    const bool near = weight < T(0.5);
    return fused(near ? weight : weight - T(1), b - a, near ? a : b);
}

static inline float as_float(int32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

static inline int32_t as_bits(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

// The nearest integer, ties to even, for |x| < 2^22: 1.5 * 2^23 leaves no room for a fraction.
static inline float nearest_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The same for 0 <= x < 2^31.
static inline float nearest(float x) {
    const float small = (x + 8388608.0f) - 8388608.0f;
    return x < 8388608.0f ? small : x;
}

static inline float clamped(float x, float bound) { return x < -bound ? -bound : (x > bound ? bound : x); }

// 2^(whole + x) for |x| <= 1/2, whole an integer. The polynomial is the series of exp(x ln 2).
static inline float scaled_power_of_two(float whole, float x) {
    float y = 1.5403530e-4f;
    y = fused(y, x, 1.3333558e-3f);
    y = fused(y, x, 9.6181291e-3f);
    y = fused(y, x, 5.5504109e-2f);
    y = fused(y, x, 2.4022651e-1f);
    y = fused(y, x, 6.9314718e-1f);
    y = fused(y, x, 1.0f);
    const int32_t half = int32_t(whole) >> 1;  // in two factors, so that small results come out right
    return y * as_float((half + 127) << 23) * as_float((int32_t(whole) - half + 127) << 23);
}

static inline float exponential(float x) {
    const float kept = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float whole = nearest_small(kept * 1.44269504f);
    const float rest = fused(whole, 1.90465421e-9f, fused(whole, -0.693147182464599609375f, kept));
    const float y = scaled_power_of_two(whole, rest * 1.44269504f);
    return x != x ? x : (x > 89.0f ? __builtin_inff() : y);
}
static inline double exponential(double x) { return __builtin_exp(x); }

// a^b for a >= 0. The logarithm to base 2 is taken as a whole number and a rest of at most 1/2, which keeps its error
// below that of the product. What lies beyond the range of floats is clamped to where it over- or underflows by itself.
static inline float power(float a, float b) {
    const bool small = a < 1.17549435e-38f;
    const int32_t shifted = as_bits(small ? a * 16777216.0f : a) - 0x3f3504f3;  // of the root of 1/2
    const float m = as_float((shifted & 0x007fffff) + 0x3f3504f3);
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    float y = 0.32059890f;  // 2 / ln 2 * atanh(s) = s * (2 + 2/3 s^2 + 2/5 s^4 + ...) / ln 2
    y = fused(y, s2, 0.41219858f);
    y = fused(y, s2, 0.57707802f);
    y = fused(y, s2, 0.96179669f);
    y = fused(y, s2, 2.88539008f);
    const float fraction = a >= 0.0f ? y * s : __builtin_nanf("");
    float exponent = float(shifted >> 23) - (small ? 24.0f : 0.0f);
    exponent = a == 0.0f ? -1e9f : (a == __builtin_inff() ? 1e9f : exponent);
    const float high = exponent * b, low = fused(exponent, b, -high);
    const float near = nearest_small(clamped(high, 200.0f));
    const float rest = (clamped(high, 200.0f) - near) + (low + fraction * b);
    const float more = nearest_small(clamped(rest, 200.0f));
    return scaled_power_of_two(clamped(near + more, 160.0f), rest - more);
}
static inline double power(double a, double b) { return __builtin_pow(a, b); }

// ------------------------------------------------------------------------------------------ types of 16 bits

static inline float from_bfloat16(uint16_t x) { return as_float(int32_t(uint32_t(x) << 16)); }

static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = uint32_t(as_bits(x));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t(x != x ? 0x7fc0u : rounded);
}

// ------------------------------------------------------------------------------------------ 8-bit codes

static inline float draw(uint32_t t, uint32_t index) {
    uint32_t x = index * 0x9E3779B1u + (t + 1u) * 0x85EBCA77u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 16)) * 0x846CA68Bu;
    return float(int32_t((x ^ (x >> 15)) >> 8)) * 5.9604644775390625e-8f;
}

static inline void only_finite(float* __restrict x, int64_t count) {
    const float infinity = __builtin_inff();
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = (i < count) & (absolute(x[i]) < infinity) ? x[i] : 0.0f;
}

static inline float log_step(int32_t low, int32_t high) {
    const float step = float(high - low) * float(1.0 / 254.0);
    return step < 2048.0f ? 2048.0f : step;
}

static inline void log_decode(const uint8_t* __restrict codes, const float* header, float* __restrict x) {
    const int32_t low = as_bits(header[0]), high = as_bits(header[1]);
    const float step = log_step(low, high);
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const int32_t code = codes[i];
        const float above = nearest((float(code) - 1.0f) * step);
        const int32_t bits = code == 255 ? high : low + int32_t(code == 0 ? 0.0f : above);
        x[i] = as_float(code == 0 ? 0 : bits);
    }
}

// Replaces x by what will be decoded. The bits of a positive number are a positive integer, those of others are not.
static inline void log_encode(uint8_t* __restrict codes, float* header, float* __restrict x, int64_t place, int64_t t) {
    int32_t bits[BLOCK], high = 0;
    uint32_t least = UINT32_MAX;  // less one, so that 0 is no minimum
    float level[BLOCK], up[BLOCK];
    for (int i = 0; i < BLOCK; ++i) bits[i] = larger(as_bits(x[i]), 0);
    for (int i = 0; i < BLOCK; ++i) high = larger(high, bits[i]);
    for (int i = 0; i < BLOCK; ++i) least = least < uint32_t(bits[i]) - 1u ? least : uint32_t(bits[i]) - 1u;
    const int32_t low = larger(int32_t(least + 1u), smaller(high, larger(high - (40 << 23), 1)));
    const float step = log_step(low, high), inverse = 1.0f / step, span = float(high - low);
    const uint32_t first = uint32_t(place), key = uint32_t(t);
    for (int i = 0; i < BLOCK; ++i) {
        const float found = float(bits[i] - low) * inverse;
        level[i] = found < 0.0f ? 0.0f : found;  // as far below as it may lie, it is kept at the lowest
        up[i] = float(int32_t(level[i] + draw(key, first + uint32_t(i))));
    }
    for (int i = 0; i < BLOCK; ++i) {
        const float near = nearest_small(level[i]);
        float rounded = absolute(level[i] - near) < 0.0009765625f ? near : up[i];
        level[i] = rounded > 254.0f ? 254.0f : rounded;
        up[i] = nearest(level[i] * step);
    }
    for (int i = 0; i < BLOCK; ++i) {
        const bool last = (up[i] >= span) | (bits[i] >= high);
        const int32_t code = last ? 255 : int32_t(level[i]) + 1, kept = last ? high : low + int32_t(up[i]);
        codes[i] = uint8_t(bits[i] > 0 ? code : 0);
        x[i] = as_float(bits[i] > 0 ? kept : 0);
    }
    header[0] = as_float(low);
    header[1] = as_float(high);
}

static inline float ratio_value(float k, float scale, float root_of_partner) {
    return k / (381.0f - 2.0f * absolute(k)) * scale * root_of_partner;
}

static inline void ratio_decode(
    const uint8_t* __restrict codes, const float* header, float* __restrict x, const float* __restrict partner) {
    const float scale = header[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = ratio_value(float(codes[i]) - 128.0f, scale, root(partner[i]));
}

static inline void ratio_encode(
    uint8_t* __restrict codes, float* header, float* __restrict x, const float* __restrict partner) {
    float ratio[BLOCK], unit[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        unit[i] = root(partner[i]);
        ratio[i] = partner[i] > 0.0f ? x[i] / unit[i] : 0.0f;
    }
    int32_t largest = 0;  // positive numbers are ordered as their bits
    for (int i = 0; i < BLOCK; ++i) largest = larger(largest, as_bits(absolute(ratio[i])));
    const float scale = from_bfloat16(to_bfloat16(as_float(largest)));
    for (int i = 0; i < BLOCK; ++i) {
        const float code = nearest_small(381.0f * ratio[i] / (scale + 2.0f * absolute(ratio[i])));
        ratio[i] = scale > 0.0f ? (code < -127.0f ? -127.0f : (code > 127.0f ? 127.0f : code)) : 0.0f;
    }
    for (int i = 0; i < BLOCK; ++i) {
        codes[i] = uint8_t(int32_t(ratio[i]) + 128);
        x[i] = ratio_value(ratio[i], scale, unit[i]);
    }
    header[0] = scale;
}

static inline void dynamic_decode(
    const uint8_t* __restrict codes, const float* header, float* __restrict x, const float* __restrict book) {
    const float scale = header[0];
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = book[codes[i]] * scale;
}

static inline void dynamic_encode(
    uint8_t* __restrict codes, float* header, float* __restrict x, const float* __restrict book, bool is_signed) {
    int32_t most = 0, first = BLOCK - 1;
    for (int i = 0; i < BLOCK; ++i) most = larger(most, as_bits(absolute(x[i])));
    for (int i = 0; i < BLOCK; ++i) first = smaller(first, as_bits(absolute(x[i])) == most ? i : int(BLOCK) - 1);
    const float scale = x[first];
    int32_t found[BLOCK];
#pragma GCC ivdep
    for (int i = 0; i < BLOCK; ++i) {
        const float z = scale != 0.0f ? x[i] / scale : 0.0f;
        int32_t above = 0;  // how many entries are below z, up to 255
        above += book[above + 127] < z ? 128 : 0;
        above += book[above + 63] < z ? 64 : 0;
        above += book[above + 31] < z ? 32 : 0;
        above += book[above + 15] < z ? 16 : 0;
        above += book[above + 7] < z ? 8 : 0;
        above += book[above + 3] < z ? 4 : 0;
        above += book[above + 1] < z ? 2 : 0;
        above += book[above] < z ? 1 : 0;
        above = larger(above, 1);
        const float down = z - book[above - 1], up = book[above] - z;
        found[i] = above - int32_t(down < up);
    }
#pragma GCC ivdep
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t least = int32_t(x[i] > 0.0f) & int32_t(!is_signed);
        const int32_t code = larger(found[i], least);
        codes[i] = uint8_t(code);
        x[i] = book[code] * scale;
    }
    header[0] = scale;
}

// ------------------------------------------------------------------------------------------ sums

template <class T> static inline void add_up(double* __restrict lanes, const T* __restrict x) {
    for (int64_t i = 0; i < BLOCK; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) lanes[j] += double(x[i + j]);
}

template <class T> static inline void take_largest(double* __restrict lanes, const T* __restrict x) {
    for (int64_t i = 0; i < BLOCK; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) lanes[j] = maximum(double(x[i + j]), lanes[j]);
}

// ------------------------------------------------------------------------------------------ normal numbers

// Philox4x32-10 of philox.py for the counter of a pair of places; two words give 53 bits between 0 and 1.
static inline void uniform_pair(uint64_t pair, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, double* u, double* v) {
    uint32_t c0 = uint32_t(pair), c1 = uint32_t(pair >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    *u = (double((int64_t(c0 >> 6) << 27) + int64_t(c1 >> 5)) + 0.5) * 0x1p-53;
    *v = (double((int64_t(c2 >> 6) << 27) + int64_t(c3 >> 5)) + 0.5) * 0x1p-53;
}

// philox.normals for `count` local elements from `local` on; `site` is tensor, first, run, stride.
template <class T>
static inline void normal_line(
    T* __restrict line, int64_t count, int64_t local, const int64_t* site, uint32_t k0, uint32_t k1, uint32_t t
) {
    const double turn = 6.283185307179586;
    const uint32_t tensor = uint32_t(site[0]);
    double u[BLOCK + 2], v[BLOCK + 2];
    if (site[2] == site[3]) {  // neighbours share their counter
        const int64_t first = site[1] + local, low = first >> 1, pairs = ((first + count + 1) >> 1) - low;
        for (int64_t j = 0; j < pairs; ++j) uniform_pair(low + j, tensor, t, k0, k1, u + j, v + j);
        for (int64_t j = 0; j < pairs; ++j) {
            const double radius = root(-2.0 * __builtin_log(u[j])), angle = v[j] * turn;
            const int64_t i = 2 * (low + j) - first;
            if (i >= 0) line[i] = T(radius * __builtin_cos(angle));
            if (i + 1 < count) line[i + 1] = T(radius * __builtin_sin(angle));
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = local + i, place = site[1] + at / site[2] * site[3] + at % site[2];
        uniform_pair(place >> 1, tensor, t, k0, k1, u + i, v + i);
        const double radius = root(-2.0 * __builtin_log(u[i])), angle = v[i] * turn;
        line[i] = T(radius * (place & 1 ? __builtin_sin(angle) : __builtin_cos(angle)));
    }
}
