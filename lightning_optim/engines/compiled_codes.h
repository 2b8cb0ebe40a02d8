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

// The nearest integer, ties to even, as processors round: for |x| < 2^31; the second for |x| < 2^22, as a float.
static inline int32_t rounded(float x) { return __builtin_irintf(x); }
static inline float nearest_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// One of two numbers as a mask says, which is all ones or zero: compilers make branches of too many `?`.
static inline int32_t mask(bool x) { return -int32_t(x); }
static inline int32_t chosen(int32_t by, int32_t a, int32_t b) { return by ? a : b; }

// In this order what is no number stays so.
static inline float clamped(float x, float bound) {
    const float above = -bound > x ? -bound : x;
    return bound < above ? bound : above;
}

// 2^(whole + x) for |x| <= 1/2, whole an integer. The polynomial is the series of exp(x ln 2).
static inline float scaled_power_of_two(float whole, float x) {
    const float x2 = x * x;
    const float low4 = fused(fused(5.5504109e-2f, x, 2.4022651e-1f), x2, fused(6.9314718e-1f, x, 1.0f));
    const float y = fused(fused(fused(1.5403530e-4f, x, 1.3333558e-3f), x, 9.6181291e-3f), x2 * x2, low4);
    const int32_t half = int32_t(whole) >> 1;  // in two factors, so that small results come out right
    return y * as_float((half + 127) << 23) * as_float((int32_t(whole) - half + 127) << 23);
}

static inline float exponential(float x) {
    const float kept = clamped(x, 105.0f);  // beyond, results are 0 and infinite as they are here
    const float whole = __builtin_rintf(kept * 1.44269504f);
    const float rest = fused(whole, 1.90465421e-9f, fused(whole, -0.693147182464599609375f, kept));
    return scaled_power_of_two(whole, rest * 1.44269504f);
}
static inline double exponential(double x) { return __builtin_exp(x); }

// a^b for a >= 0. The logarithm to base 2 is taken as a whole number and a rest of at most 1/2, which keeps its error
// below that of the product. The polynomial is the best one of its degree for log2(1 + x) / x between the roots of 1/2
// and 2.
static inline float power(float a, float b) {
    const int32_t small = mask(a < 1.17549435e-38f);
    const int32_t shifted = as_bits(a * as_float(chosen(small, 0x4b800000, 0x3f800000))) - 0x3f3504f3;  // of the root of 1/2
    const float x = as_float((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const float x2 = x * x, x4 = x2 * x2;  // in pairs, so that few products wait for each other
    const float low4 = fused(fused(-0.360716264f, x, 0.48091028f), x2, fused(-0.721347199f, x, 1.442695f));
    const float high4 = fused(fused(-0.208933818f, x, 0.215212254f), x2, fused(-0.23867568f, x, 0.287939094f));
    const float y = fused(fused(x4, 0.129264294f, high4), x4, low4) * x;
    const float whole = float((shifted >> 23) - (24 & small));
    const float exponent = a == 0.0f ? -1e9f : (a == __builtin_inff() ? 1e9f : whole);
    const float high = exponent * b, near = __builtin_rintf(high);
    const float rest = (high - near) + fused(y, b, fused(exponent, b, -high)), more = __builtin_rintf(rest);
    const float found = scaled_power_of_two(clamped(near + more, 160.0f), rest - more);
    return a >= 0.0f ? found : __builtin_nanf("");
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

// Encoders keep what is not finite as zero; what lies behind a tensor's end is zero already.

static inline uint32_t hash(uint32_t t, uint32_t index) {
    uint32_t x = index * 0x9E3779B1u + (t + 1u) * 0x85EBCA77u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 16)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

static inline float draw(uint32_t sixteen_bits) { return float(int32_t(sixteen_bits)); }

static inline float log_step(int32_t low, int32_t high) {
    const float step = float(high - low) * float(1.0 / 254.0);
    return step < 2048.0f ? 2048.0f : step;
}

static inline void log_decode(const uint8_t* __restrict codes, const float* header, float* __restrict x) {
    const int32_t low = as_bits(header[0]), high = as_bits(header[1]);
    const float step = log_step(low, high);
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const int32_t code = codes[i], bits = low + rounded((float(code) - 1.0f) * step);
        x[i] = as_float(chosen(mask(code == 255), high, bits) & mask(code > 0));
    }
}

// Replaces x by what will be decoded. The bits of a positive number are a positive integer, those of others are not.
static inline void log_encode(uint8_t* __restrict codes, float* header, float* __restrict x, int64_t place, int64_t t) {
    int32_t bits[BLOCK], up[BLOCK], high = 0;
    uint32_t least = UINT32_MAX;  // less one, so that 0 is no minimum
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
        level[i] = found < 0.0f ? 0.0f : found;  // as far below as it may lie, it is kept at the lowest
    }
    const uint32_t half = BLOCK / 2, first = uint32_t(place / 2), key = uint32_t(t);
    for (uint32_t i = 0; i < half; ++i) {
        const uint32_t drawn = hash(key, first + i);
        up[i] = int32_t(fused(draw(drawn & 0xffffu), 1.52587890625e-5f, level[i]));
        up[i + half] = int32_t(fused(draw(drawn >> 16), 1.52587890625e-5f, level[i + half]));
    }
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t near = rounded(level[i]), snaps = mask(absolute(level[i] - float(near)) < 0.0009765625f);
        const int32_t whole = smaller(chosen(snaps, near, up[i]), 254), above = rounded(float(whole) * step);
        const int32_t last = mask((above >= span) | (bits[i] >= high)), some = mask(bits[i] > 0);
        x[i] = as_float(chosen(last, high, low + above) & some);
        bits[i] = ((whole + 1) | last) & some;
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(bits[i]);  // apart, or a loop would take 32 elements at a time
    header[0] = as_float(low);
    header[1] = as_float(high);
}

static inline float per_root(float v) { return as_float(0x5f400000 - (as_bits(v) >> 1)); }

static inline void ratio_decode(
    const uint8_t* __restrict codes, const float* header, float* __restrict x, const float* __restrict partner) {
    const float scale = header[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < BLOCK; ++i) {
        const float k = float(codes[i]) - 128.0f;
        x[i] = k * scale / (fused(-2.0f, absolute(k), 381.0f) * per_root(partner[i]));
    }
}

static inline void ratio_encode(
    uint8_t* __restrict codes, float* header, const float* __restrict x, const float* __restrict partner) {
    float ratio[BLOCK];
    int32_t largest = 0;  // positive numbers are ordered as their bits
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
    header[0] = scale;
}

static inline void dynamic_decode(
    const uint8_t* __restrict codes, const float* header, float* __restrict x, const float* __restrict book) {
    const float scale = header[0];
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = book[codes[i]] * scale;
}

// Behind the 256 entries of the book stand, for each cell of numbers that share exponent and seven bits behind it, how
// many codes begin below it, and where in it one more does.
static constexpr int32_t CELLS = 2945, NEAREST_CELL = 13312;

static inline void dynamic_encode(
    uint8_t* __restrict codes, float* header, float* __restrict x, const float* __restrict book, bool is_signed) {
    const int32_t* __restrict below = (const int32_t*)book + 256;
    const float* __restrict begins = book + 256 + 2 * CELLS;
    int32_t found[BLOCK], most = 0, first = BLOCK - 1;
    for (int i = 0; i < BLOCK; ++i) x[i] = as_float(as_bits(x[i]) & mask(absolute(x[i]) < __builtin_inff()));
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
