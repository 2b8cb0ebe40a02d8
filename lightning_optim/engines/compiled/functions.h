// What printed kernels call: elementary functions, types of 16 bits, and 8-bit codes as in storage/.
//
// Loops are written so that a compiler turns them into vector instructions: no branch, no call, buffers that do not
// overlap. Sums and products stay apart (-ffp-contract=off) save where torch itself takes both in one rounding, so the
// numbers are those of torch.

#include <stdint.h>  // and nothing else: the headers of C++ would take longer than the rest

static constexpr int64_t BLOCK = 256;  // elements that share scales
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

// The nearest integer, ties to even, as processors round, for |x| < 2^31.
static inline int32_t rounded(float x) { return __builtin_irintf(x); }

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

// Quantizers keep what is not finite as zero; what lies behind a tensor's end is zero already.

static inline uint32_t hash(uint32_t t, uint32_t index) {
    uint32_t x = index * 0x9E3779B1u + (t + 1u) * 0x85EBCA77u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 16)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

static inline float whole(uint32_t sixteen_bits) { return float(int32_t(sixteen_bits)); }

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

// Replaces x by what will be dequantized. The bits of a positive number are a positive integer, those of others are not.
static inline void log_quantize(uint8_t* __restrict codes, float* scales, float* __restrict x, int64_t place, int64_t t) {
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
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(bits[i]);  // apart, or a loop would take 32 elements at a time
    scales[0] = as_float(low);
    scales[1] = as_float(high);
}

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
    scales[0] = scale;
}

static inline void dynamic_dequantize(
    const uint8_t* __restrict codes, const float* scales, float* __restrict x, const float* __restrict codebook) {
    const float scale = scales[0];
    for (int64_t i = 0; i < BLOCK; ++i) x[i] = codebook[codes[i]] * scale;
}

// Behind the 256 entries of the codebook stand, for each cell of numbers that share exponent and seven bits behind it, how
// many codes begin below it, and where in it one more does.
static constexpr int32_t CELLS = 2945, NEAREST_CELL = 13312;

static inline void dynamic_quantize(
    uint8_t* __restrict codes, float* scales, float* __restrict x, const float* __restrict codebook, bool is_signed) {
    const int32_t* __restrict below = (const int32_t*)codebook + 256;
    const float* __restrict begins = codebook + 256 + 2 * CELLS;
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
    scales[0] = scale;
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

static inline double as_double(uint64_t bits) {
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
}

static inline uint64_t as_bits(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    return bits;
}

// Below 2^52, as a float64: processors have no instruction for it that takes several.
static inline double from_whole(uint64_t x) { return as_double(x | 0x4330000000000000u) - 0x1p52; }

// The natural logarithm of a normal number > 0: of the power of two, and of the rest m between the roots of 1/2 and 2
// by the series of atanh((m - 1) / (m + 1)).
static inline double logarithm(double x) {
    const uint64_t shifted = as_bits(x) - 0x3fe6a09e667f3bcdu + 0x3ff0000000000000u;  // as if the root of 1/2 were 1
    const double whole = from_whole(shifted >> 52) - 1023.0;
    const double m = as_double((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    const double s = (m - 1.0) / (m + 1.0), x2 = s * s, x4 = x2 * x2, x8 = x4 * x4;
    const double low = fused(fused(1.0 / 7, x2, 1.0 / 5), x4, fused(1.0 / 3, x2, 0.0));
    const double high = fused(fused(1.0 / 15, x2, 1.0 / 13), x4, fused(1.0 / 11, x2, 1.0 / 9));
    const double top = fused(fused(1.0 / 23, x2, 1.0 / 21), x4, fused(1.0 / 19, x2, 1.0 / 17));
    const double series = fused(fused(top, x8, high), x8, low);
    return fused(whole, 0x1.62e42fefa39efp-1, fused(2.0 * s, series, fused(whole, 0x1.abc9e3b39803fp-56, 2.0 * s)));
}

// Sine and cosine of a number of turns, in [0, 1]: by their series within an eighth of a turn.
static inline void turned(double turns, double* __restrict cosine, double* __restrict sine) {
    const double quarter = __builtin_rint(4.0 * turns), x = (turns - 0.25 * quarter) * 6.283185307179586;
    const double x2 = x * x;
    double c = 1.0 / 20922789888000.0, s = 1.0 / 355687428096000.0;
    c = fused(c, x2, -1.0 / 87178291200.0);
    s = fused(s, x2, -1.0 / 1307674368000.0);
    c = fused(c, x2, 1.0 / 479001600.0);
    s = fused(s, x2, 1.0 / 6227020800.0);
    c = fused(c, x2, -1.0 / 3628800.0);
    s = fused(s, x2, -1.0 / 39916800.0);
    c = fused(c, x2, 1.0 / 40320.0);
    s = fused(s, x2, 1.0 / 362880.0);
    c = fused(c, x2, -1.0 / 720.0);
    s = fused(s, x2, -1.0 / 5040.0);
    c = fused(c, x2, 1.0 / 24.0);
    s = fused(s, x2, 1.0 / 120.0);
    c = fused(c, x2, -0.5);
    s = fused(s, x2, -1.0 / 6.0);
    c = fused(c, x2, 1.0);
    s = fused(s * x2, x, x);
    const bool odd = (quarter == 1.0) | (quarter == 3.0);
    const double one = odd ? -s : c, other = odd ? c : s;
    const bool behind = (quarter == 2.0) | (quarter == 3.0);
    *cosine = behind ? -one : one;
    *sine = behind ? -other : other;
}

// Four words of 32 bits, each in 64, of which the upper half may hold anything: what a product of two takes.
typedef uint64_t Words __attribute__((vector_size(32)));

static inline Words product(Words a, uint64_t b) {
#if defined(__AVX2__) && !defined(__clang__)  // the instruction that others find by themselves
    typedef int32_t Halves __attribute__((vector_size(32)));
    return (Words)__builtin_ia32_pmuludq256((Halves)a, (Halves)(Words{b, b, b, b}));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// Two words give 53 bits between 0 and 1.
static inline double uniform(uint64_t high, uint64_t low) {
    return (fused(from_whole((high & 0xffffffffu) >> 6), 0x1p27, from_whole((low & 0xffffffffu) >> 5)) + 0.5) * 0x1p-53;
}

// Philox4x32-10 of philox.py: two uniform numbers for each of `count` pairs of places.
static inline void uniform_pairs(
    const uint64_t* __restrict pairs, int64_t count, uint64_t c2, uint64_t c3, uint32_t k0, uint32_t k1,
    double* __restrict u, double* __restrict v
) {
    uint64_t words[4][BLOCK];
    for (int64_t j = 0; j < count; j += 4) {
        Words a, b, c = {c2, c2, c2, c2}, d = {c3, c3, c3, c3};
        __builtin_memcpy(&a, pairs + j, 32);
        b = a >> 32;
        uint64_t key0 = k0, key1 = k1;
        for (int round = 0; round < 10; ++round) {
            const Words p0 = product(a, 0xD2511F53u), p1 = product(c, 0xCD9E8D57u);
            a = (p1 >> 32) ^ b ^ key0;
            c = (p0 >> 32) ^ d ^ key1;
            b = p1;
            d = p0;
            key0 = uint32_t(key0 + 0x9E3779B9u);
            key1 = uint32_t(key1 + 0xBB67AE85u);
        }
        __builtin_memcpy(words[0] + j, &a, 32);
        __builtin_memcpy(words[1] + j, &b, 32);
        __builtin_memcpy(words[2] + j, &c, 32);
        __builtin_memcpy(words[3] + j, &d, 32);
    }
    for (int64_t j = 0; j < count; ++j) {
        u[j] = uniform(words[0][j], words[1][j]);
        v[j] = uniform(words[2][j], words[3][j]);
    }
}

// Box and Muller: replaces pairs of uniform numbers by pairs of normal ones.
static inline void normal_pairs(double* __restrict u, double* __restrict v, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        double cosine, sine;
        turned(v[j], &cosine, &sine);
        const double radius = root(-2.0 * logarithm(u[j]));
        u[j] = radius * cosine;
        v[j] = radius * sine;
    }
}

// philox.normals for `count` local elements from `local` on; `site` is tensor, first, run, stride.
template <class T>
static inline void normal_line(
    T* __restrict line, int64_t count, int64_t local, const int64_t* site, uint32_t k0, uint32_t k1, uint32_t t
) {
    const uint32_t tensor = uint32_t(site[0]);
    uint64_t pairs[BLOCK] = {};
    double u[BLOCK], v[BLOCK];
    if (site[2] == site[3]) {  // neighbours share their counter
        const int64_t first = site[1] + local, odd = first & 1, count_of_pairs = (count + odd + 1) >> 1;
        for (int64_t j = 0; j < count_of_pairs; ++j) pairs[j] = uint64_t((first >> 1) + j);
        uniform_pairs(pairs, count_of_pairs, tensor, t, k0, k1, u, v);
        normal_pairs(u, v, count_of_pairs);
        for (int64_t i = 0; i < count; ++i) line[i] = T((i + odd) & 1 ? v[(i + odd) >> 1] : u[(i + odd) >> 1]);
        return;
    }
    bool odd[BLOCK];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = local + i, place = site[1] + at / site[2] * site[3] + at % site[2];
        pairs[i] = uint64_t(place >> 1);
        odd[i] = place & 1;
    }
    uniform_pairs(pairs, count, tensor, t, k0, k1, u, v);
    normal_pairs(u, v, count);
    for (int64_t i = 0; i < count; ++i) line[i] = T(odd[i] ? v[i] : u[i]);
}
