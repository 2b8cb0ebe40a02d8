// Normal numbers, as in distributed/philox.py.

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

// An integer below 2^52 as a float64. AVX2 has no vector instruction for this conversion.
static inline double from_whole(uint64_t x) { return as_double(x | 0x4330000000000000u) - 0x1p52; }

// The natural logarithm of a normal float64 x > 0, x = 2^whole * m with m between the roots of 1/2 and 2. That of m is
// the series of 2 atanh((m - 1) / (m + 1)).
static inline double logarithm(double x) {
    const uint64_t shifted = as_bits(x) - 0x3fe6a09e667f3bcdu + 0x3ff0000000000000u;  // the exponent changes at the root of 1/2
    const double whole = from_whole(shifted >> 52) - 1023.0;
    const double m = as_double((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    const double s = (m - 1.0) / (m + 1.0), x2 = s * s, x4 = x2 * x2, x8 = x4 * x4;
    const double low = fused(fused(1.0 / 7, x2, 1.0 / 5), x4, fused(1.0 / 3, x2, 0.0));
    const double high = fused(fused(1.0 / 15, x2, 1.0 / 13), x4, fused(1.0 / 11, x2, 1.0 / 9));
    const double top = fused(fused(1.0 / 23, x2, 1.0 / 21), x4, fused(1.0 / 19, x2, 1.0 / 17));
    const double series = fused(fused(top, x8, high), x8, low);
    return fused(whole, 0x1.62e42fefa39efp-1, fused(2.0 * s, series, fused(whole, 0x1.abc9e3b39803fp-56, 2.0 * s)));
}

// Sine and cosine of an angle in turns, in [0, 1]: their series within an eighth of a turn of the nearest quarter.
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

// Four words of 32 bits, each in 64 bits as their products need it. The upper halves may hold anything.
typedef uint64_t Words __attribute__((vector_size(32)));

static inline Words product(Words a, uint64_t b) {
#if defined(__AVX2__) && !defined(__clang__)  // other compilers find this instruction themselves
    typedef int32_t Halves __attribute__((vector_size(32)));
    return (Words)__builtin_ia32_pmuludq256((Halves)a, (Halves)(Words{b, b, b, b}));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// A uniform number in (0, 1) with 53 bits, from two words.
static inline double uniform(uint64_t high, uint64_t low) {
    return (fused(from_whole((high & 0xffffffffu) >> 6), 0x1p27, from_whole((low & 0xffffffffu) >> 5)) + 0.5) * 0x1p-53;
}

// Philox4x32-10, as in distributed/philox.py: two uniform numbers for each of `count` pairs of elements.
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

// The Box-Muller transform: replaces pairs of uniform numbers by pairs of normal ones.
static inline void normal_pairs(double* __restrict u, double* __restrict v, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        double cosine, sine;
        turned(v[j], &cosine, &sine);
        const double radius = root(-2.0 * logarithm(u[j]));
        u[j] = radius * cosine;
        v[j] = radius * sine;
    }
}

// `normals` of distributed/philox.py for `count` elements from the local index `local` on. `global_index` holds tensor,
// first, run, stride, and rows, columns and unit of the order in memory.
template <class T>
static inline void normal_block(
    T* __restrict x, int64_t count, int64_t local, const int64_t* global_index, uint32_t k0, uint32_t k1, uint32_t t
) {
    const uint32_t tensor = uint32_t(global_index[0]);
    uint64_t pairs[BLOCK] = {};
    double u[BLOCK], v[BLOCK];
    const int64_t rows = global_index[4], columns = global_index[5], unit = global_index[6], table = rows * columns;
    if (global_index[2] == global_index[3] && table == 1) {  // neighbours are a pair, which shares a counter
        const int64_t first = global_index[1] + local, odd = first & 1, count_of_pairs = (count + odd + 1) >> 1;
        for (int64_t j = 0; j < count_of_pairs; ++j) pairs[j] = uint64_t((first >> 1) + j);
        uniform_pairs(pairs, count_of_pairs, tensor, t, k0, k1, u, v);
        normal_pairs(u, v, count_of_pairs);
        for (int64_t i = 0; i < count; ++i) x[i] = T((i + odd) & 1 ? v[(i + odd) >> 1] : u[(i + odd) >> 1]);
        return;
    }
    bool odd[BLOCK];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t group = (local + i) / unit, in_table = group % table;
        const int64_t at = (group - in_table + in_table % columns * rows + in_table / columns) * unit + (local + i) % unit;
        const int64_t index = global_index[1] + at / global_index[2] * global_index[3] + at % global_index[2];
        pairs[i] = uint64_t(index >> 1);
        odd[i] = index & 1;
    }
    uniform_pairs(pairs, count, tensor, t, k0, k1, u, v);
    normal_pairs(u, v, count);
    for (int64_t i = 0; i < count; ++i) x[i] = T(odd[i] ? v[i] : u[i]);
}
