// The functions that printed kernels call: elementary functions, types of 16 bits, dither and sums.
//
// Loops have no branch, no call and no buffers that overlap, so that a compiler turns them into vector instructions.
// Sums and products are rounded separately (-ffp-contract=off) except where torch rounds both at once, so results equal
// those of torch.

#include <stdint.h>  // and nothing else: C++ headers would take longer to compile than the rest

static constexpr int64_t BLOCK = 256;  // elements that share scales
static constexpr int64_t LANES = 16;   // partial sums, one for each lane of a vector

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
// 0 where x is finite and above 2^50, in double above 2^500, else x. In float that is a range of its bits.
static inline float squarable(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return (bits & 0x7fffffffu) - 0x58800001u < 0x7f800000u - 0x58800001u ? 0.0f : x;
}
static inline double squarable(double x) {
    return (absolute(x) > 0x1p500) & (absolute(x) < __builtin_inf()) ? 0.0 : x;
}

// Two choices, each of which a compiler turns into one instruction: of one of two conditions it makes branches where two
// bounds follow each other.
template <class T> static inline T maximum(T a, T b) { const T larger = a > b ? a : b; return a == a ? larger : a; }
template <class T> static inline T minimum(T a, T b) { const T smaller = a < b ? a : b; return a == a ? smaller : a; }

// From the nearer of the two ends and with one rounding, as in torch.
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

// A mask is all ones or zero. `chosen` selects by it, because compilers turn too many `?` into branches.
static inline int32_t mask(bool x) { return -int32_t(x); }
static inline int32_t chosen(int32_t by, int32_t a, int32_t b) { return by ? a : b; }

// In this order a NaN stays a NaN.
static inline float clamped(float x, float bound) {
    const float above = -bound > x ? -bound : x;
    return bound < above ? bound : above;
}

// 2^(whole + x) for |x| <= 1/2, whole an integer. The polynomial is the series of exp(x ln 2).
static inline float scaled_power_of_two(float whole, float x) {
    const float x2 = x * x;
    const float low4 = fused(fused(5.5504109e-2f, x, 2.4022651e-1f), x2, fused(6.9314718e-1f, x, 1.0f));
    const float y = fused(fused(fused(1.5403530e-4f, x, 1.3333558e-3f), x, 9.6181291e-3f), x2 * x2, low4);
    const int32_t half = int32_t(whole) >> 1;  // in two factors, so that subnormal results are right
    return y * as_float((half + 127) << 23) * as_float((int32_t(whole) - half + 127) << 23);
}

static inline float exponential(float x) {
    const float kept = clamped(x, 105.0f);  // beyond these bounds results are 0 and infinity as at them
    const float whole = __builtin_rintf(kept * 1.44269504f);
    const float rest = fused(whole, 1.90465421e-9f, fused(whole, -0.693147182464599609375f, kept));
    return scaled_power_of_two(whole, rest * 1.44269504f);
}
static inline double exponential(double x) { return __builtin_exp(x); }

// a^b for a >= 0. The logarithm to base 2 is split into an integer and a rest of at most 1/2, so its error stays below
// that of the product. The polynomial is the minimax approximation of log2(1 + x) / x between the roots of 1/2 and 2.
static inline float power(float a, float b) {
    const int32_t small = mask(a < 1.17549435e-38f);
    const int32_t shifted = as_bits(a * as_float(chosen(small, 0x4b800000, 0x3f800000))) - 0x3f3504f3;  // of the root of 1/2
    const float x = as_float((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const float x2 = x * x, x4 = x2 * x2;  // in pairs, so that fewer products depend on each other
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

// ------------------------------------------------------------------------------------------ dither

// As in storage/quantized.py: the multiples of two irrational numbers. From 2047 to 2048 the fraction is the last 13 bits of
// a float.
static inline uint32_t dither_of(int64_t index, int64_t t) { return uint32_t(index) * 0xC13FA9A9u + uint32_t(t) * 0x91E10DA5u; }

static inline float dither(uint32_t first, int32_t i) {
    const uint32_t x = first + uint32_t(i) * 0xC13FA9A9u;
    return as_float(int32_t((x >> 19) | 0x44ffe001u)) - 2047.5f;
}

// ------------------------------------------------------------------------------------------ memory

// Ask for a block long before it is read. Hardware does so by itself within a page, but not beyond its end.
template <class T> static inline void fetch(const T* block) {
    for (int64_t i = 0; i < BLOCK; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(block + i);
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

// ------------------------------------------------------------------------------------------ statistics

// The index of an element along the axes of a layout.
template <int AXES> static inline void locate(int64_t* index, int64_t element, const int64_t* sizes) {
    for (int axis = AXES - 1; axis > 0; --axis) {
        index[axis] = element % sizes[axis];
        element /= sizes[axis];
    }
    index[0] = element;
}

// The number of elements, at most `most`, up to the end of the innermost axis.
template <int AXES> static inline int64_t run_of(const int64_t* index, const int64_t* sizes, int64_t most) {
    const int64_t left = sizes[AXES - 1] - index[AXES - 1];
    return left < most ? left : most;
}

// Go on by a run.
template <int AXES> static inline void advance(int64_t* index, int64_t run, const int64_t* sizes) {
    index[AXES - 1] += run;
    for (int axis = AXES - 1; axis > 0 && index[axis] == sizes[axis]; --axis) {
        index[axis] = 0;
        ++index[axis - 1];
    }
}

// Where in a statistic the number of an element is.
template <int AXES> static inline int64_t offset(const int64_t* index, const int64_t* strides) {
    int64_t found = 0;
    for (int axis = 0; axis < AXES; ++axis) found += index[axis] * strides[axis];
    return found;
}

// The numbers of the elements of a run, which begins at element i of a block of `inside` elements: in the statistic itself
// where the run is the whole block and they lie side by side, else in `buffer`.
template <class T>
static inline const T* spread(T* __restrict buffer, const T* __restrict statistic, int64_t stride, int64_t i, int64_t run, int64_t inside) {
    if (stride == 1 && run == inside) return statistic;
    T* out = buffer + i;
    if (stride == 0) {
        const T x = *statistic;
        for (int64_t j = 0; j < run; ++j) out[j] = x;
    } else if (stride == 1) {
        for (int64_t j = 0; j < run; ++j) out[j] = statistic[j];
    } else {
        for (int64_t j = 0; j < run; ++j) out[j] = statistic[j * stride];
    }
    return buffer;
}

typedef double Doubles __attribute__((vector_size(64), aligned(8)));
typedef float Floats __attribute__((vector_size(32), aligned(4)));
static inline Doubles doubles(const float* x) { return __builtin_convertvector(*(const Floats*)x, Doubles); }
static inline Doubles doubles(const double* x) { return *(const Doubles*)x; }

static inline double total(Doubles x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// Add the elements of a run to the sum of all of them, and with COLUMNS each also to a sum of its own. The order of
// additions is always the same. Inside another loop it would be four times as slow.
template <bool COLUMNS, class T>
__attribute__((noinline)) static void add_row(double* __restrict sum, double* __restrict columns, const T* __restrict x, int64_t run) {
    Doubles first = {}, second = {};
    int64_t i = 0;
    for (; i + 16 <= run; i += 16) {
        const Doubles a = doubles(x + i), b = doubles(x + i + 8);
        first += a;
        second += b;
        if (COLUMNS) {
            *(Doubles*)(columns + i) += a;
            *(Doubles*)(columns + i + 8) += b;
        }
    }
    double found = total(first + second);
    for (; i < run; ++i) {
        found += double(x[i]);
        if (COLUMNS) columns[i] += double(x[i]);
    }
    *sum += found;
}

// Add the elements of a run to their sums.
template <class T>
__attribute__((noinline)) static void add_towards(double* __restrict sums, int64_t stride, const T* __restrict x, int64_t run) {
    if (stride == 0) return add_row<false>(sums, (double*)0, x, run);
    if (stride == 1) {
        for (int64_t i = 0; i < run; ++i) sums[i] += double(x[i]);
    } else {
        for (int64_t i = 0; i < run; ++i) sums[i * stride] += double(x[i]);
    }
}

// Add the elements of a run to their sums of two kinds.
template <class T>
static inline void add_towards(double* sums, int64_t stride, double* others, int64_t other_stride, const T* x, int64_t run) {
    if (stride == 0 && other_stride == 1) return add_row<true>(sums, others, x, run);
    if (stride == 1 && other_stride == 0) return add_row<true>(others, sums, x, run);
    add_towards(sums, stride, x, run);
    add_towards(others, other_stride, x, run);
}
