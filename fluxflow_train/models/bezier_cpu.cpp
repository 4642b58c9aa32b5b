// The Bezier activation and its gradient for CPUs; bezier_cpu.py compiles it with the constants of one activation:
//   DEGREE      1, 2 or 3
//   T_ACT P_ACT pre-activation of t and of the control points: 0 none, 1 sigmoid, 2 tanh, 3 silu
// x is (N, K, M), K = DEGREE + 2, plane 0 is t; y is (N, M); both contiguous. The formulas are bezier_curve.py's.
//
// The N * M outputs are cut into tiles that fit the first-level cache: planes are gathered into float rows, the
// arithmetic runs over whole rows (one loop for every layout and type, which the compiler vectorises), and is scattered
// back. A tile does not depend on the number of threads, so neither does a single bit of the result.

#include <sys/mman.h>

using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned;
struct bf16 { unsigned short bits; };

constexpr int K = DEGREE + 2;
constexpr int TILE = 512;
constexpr int NONE = 0, SIGMOID = 1, TANH = 2, SILU = 3;

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    u32 bits = u32(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
static inline void from_float(float x, float& y) { y = x; }
// To nearest, ties to even. A NaN stays one: the low bits of those that come from bf16 or from arithmetic are zero.
static inline void from_float(float x, bf16& y) {
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    y.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 1 + 2^y for |y| <= 42 to about 1e-7, NaN for NaN: 2^n, n whole, times a polynomial in f = y - n on [-1/2, 1/2].
// The coefficients are the relative minimax fit of degree 6. y = c x is never rounded: f comes out of one fused step.
static inline float one_plus_exp2(float c, float x) {
    constexpr float LIMIT = 29.0f;  // sigmoid(-29) = 2.5e-13; three such denominators still have a finite product
    x = x < -LIMIT ? -LIMIT : x;
    x = x > LIMIT ? LIMIT : x;
    constexpr float ROUND = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's low bits are n, plus the exponent's bias
    float shifted = c * x + ROUND;
    float f = c * x - (shifted - ROUND);
    float p = 1.534581242594868e-4f;
    p = p * f + 1.3399930903688073e-3f;
    p = p * f + 9.618489071726799e-3f;
    p = p * f + 5.550328642129898e-2f;
    p = p * f + 2.4022646248340607e-1f;
    p = p * f + 6.931471824645996e-1f;
    p = p * f + 1.0f;
    u32 bits;
    __builtin_memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float scale;
    __builtin_memcpy(&scale, &bits, 4);
    return p * scale + 1.0f;
}

constexpr int act(int k) { return k == 0 ? T_ACT : P_ACT; }
static inline float denominator(int a, float x) {  // of the sigmoid inside the pre-activation
    constexpr float LOG2_E = 1.44269504088896341f;
    if (a == NONE) return 1.0f;
    return a == TANH ? one_plus_exp2(-LOG2_E, 2.0f * x) : one_plus_exp2(-LOG2_E, x);
}
static inline float value(int a, float x, float s) {
    return a == NONE ? x : a == SIGMOID ? s : a == TANH ? 2.0f * s - 1.0f : x * s;
}
static inline float slope(int a, float x, float s) {
    if (a == NONE) return 1.0f;
    return a == SIGMOID ? s * (1.0f - s) : a == TANH ? 4.0f * s * (1.0f - s) : s + x * s * (1.0f - s);
}

// Divisions are what these loops wait for, so one serves two or three sigmoids: 1/a = b / (a b).
static inline void reciprocals(float a, float b, float* s) {
    float r = 1.0f / (a * b);
    s[0] = r * b, s[1] = r * a;
}
static inline void reciprocals(float a, float b, float c, float* s) {
    float ab = a * b, r = 1.0f / (ab * c), rc = r * c;
    s[0] = rc * b, s[1] = rc * a, s[2] = r * ab;
}
static inline void sigmoids(const float* x, float* s) {
    float d[K];
#pragma GCC unroll 5
    for (int k = 0; k < K; k++) d[k] = denominator(act(k), x[k]);
    if (K == 3) return reciprocals(d[0], d[1], d[2], s);
    reciprocals(d[0], d[1], s);
    if (K == 4) reciprocals(d[2], d[3], s + 2);
    if (K == 5) reciprocals(d[2], d[3], d[4], s + 2);
}

static inline float curve(float t, const float* p) {
    float u = 1.0f - t;
    if (DEGREE == 1) return u * p[0] + t * p[1];
    if (DEGREE == 2) return u * u * p[0] + 2.0f * u * t * p[1] + t * t * p[2];
    return u * u * u * p[0] + 3.0f * u * u * t * p[1] + 3.0f * u * t * t * p[2] + t * t * t * p[3];
}

static void forward_rows(float (*x)[TILE], float* y, float gain) {
    for (int j = 0; j < TILE; j++) {
        float v[K], s[K];
#pragma GCC unroll 5
        for (int k = 0; k < K; k++) v[k] = x[k][j];
        sigmoids(v, s);
#pragma GCC unroll 5
        for (int k = 0; k < K; k++) v[k] = value(act(k), v[k], s[k]);
        y[j] = gain * curve(v[0], v + 1);
    }
}

// Overwrites the rows of x with their gradients.
static void backward_rows(float (*x)[TILE], const float* grad, float gain) {
    for (int j = 0; j < TILE; j++) {
        float v[K], s[K], d[K], b[K];
#pragma GCC unroll 5
        for (int k = 0; k < K; k++) v[k] = x[k][j];
        sigmoids(v, s);
        float g = gain * grad[j];
#pragma GCC unroll 5
        for (int k = 0; k < K; k++) {
            d[k] = g * slope(act(k), v[k], s[k]);
            v[k] = value(act(k), v[k], s[k]);
        }
        float t = v[0], u = 1.0f - t;
        const float* p = v + 1;
        if (DEGREE == 1) {
            b[0] = p[1] - p[0], b[1] = u, b[2] = t;
        } else if (DEGREE == 2) {
            b[0] = 2.0f * (u * (p[1] - p[0]) + t * (p[2] - p[1]));
            b[1] = u * u, b[2] = 2.0f * u * t, b[3] = t * t;
        } else {
            float uu = u * u, tt = t * t, ut = u * t;
            b[0] = 3.0f * (uu * (p[1] - p[0]) + 2.0f * ut * (p[2] - p[1]) + tt * (p[3] - p[2]));
            b[1] = uu * u, b[2] = 3.0f * ut * u, b[3] = 3.0f * ut * t, b[4] = tt * t;
        }
#pragma GCC unroll 5
        for (int k = 0; k < K; k++) x[k][j] = d[k] * b[k];
    }
}

// Calls each(first position in the tile, first position of plane 0, length) for the stretches of a tile within one n.
template <class F>
static inline void stretches(i64 begin, i64 end, i64 m, F each) {
    i64 row = begin / m, column = begin % m;
    for (i64 i = begin; i < end; row++, column = 0) {
        i64 length = m - column < end - i ? m - column : end - i;
        each(i - begin, row * K * m + column, length);
        i += length;
    }
}

template <class T>
static inline void gather(const T* x, i64 begin, i64 end, i64 m, float (*rows)[TILE]) {
    if (m == 1) {  // interleaved in the last dimension: no stretch is longer than one
        for (i64 i = begin; i < end; i++)
            for (int k = 0; k < K; k++) rows[k][i - begin] = to_float(x[i * K + k]);
        return;
    }
    stretches(begin, end, m, [=](i64 to, i64 from, i64 length) {
        for (int k = 0; k < K; k++)
            for (i64 j = 0; j < length; j++) rows[k][to + j] = to_float(x[from + k * m + j]);
    });
}

template <class T>
static inline void scatter(float (*rows)[TILE], i64 begin, i64 end, i64 m, T* x) {
    if (m == 1) {
        for (i64 i = begin; i < end; i++)
            for (int k = 0; k < K; k++) from_float(rows[k][i - begin], x[i * K + k]);
        return;
    }
    stretches(begin, end, m, [=](i64 from, i64 to, i64 length) {
        for (int k = 0; k < K; k++)
            for (i64 j = 0; j < length; j++) from_float(rows[k][from + j], x[to + k * m + j]);
    });
}

// A block that the allocator takes fresh from the kernel each time (glibc: 32 MiB and more) costs more in page faults
// than in arithmetic; huge pages make them few.
static void want_huge_pages(void* start, u64 bytes) {
#ifdef MADV_HUGEPAGE
    u64 page = 4096, first = (u64(start) + page - 1) / page * page, last = (u64(start) + bytes) / page * page;
    if (bytes >= (32u << 20)) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
static inline void forward(const T* x, T* y, i64 n, i64 m, float gain, int threads) {
    i64 total = n * m;
    want_huge_pages(y, total * sizeof(T));
#pragma omp parallel num_threads(threads) if (total > 8 * TILE)
    {
        alignas(64) float rows[K][TILE] = {};  // the last tile may be short: what lies behind its end is never read
        alignas(64) float out[TILE];
#pragma omp for schedule(static)
        for (i64 begin = 0; begin < total; begin += TILE) {
            i64 end = begin + TILE < total ? begin + TILE : total;
            gather(x, begin, end, m, rows);
            forward_rows(rows, out, gain);
            for (i64 i = begin; i < end; i++) from_float(out[i - begin], y[i]);
        }
    }
}

template <class T>
static inline void backward(const T* x, const T* grad, T* x_grad, i64 n, i64 m, float gain, int threads) {
    i64 total = n * m;
    want_huge_pages(x_grad, total * K * sizeof(T));
#pragma omp parallel num_threads(threads) if (total > 8 * TILE)
    {
        alignas(64) float rows[K][TILE] = {};
        alignas(64) float g[TILE] = {};
#pragma omp for schedule(static)
        for (i64 begin = 0; begin < total; begin += TILE) {
            i64 end = begin + TILE < total ? begin + TILE : total;
            gather(x, begin, end, m, rows);
            for (i64 i = begin; i < end; i++) g[i - begin] = to_float(grad[i]);
            backward_rows(rows, g, gain);
            scatter(rows, begin, end, m, x_grad);
        }
    }
}

extern "C" {
void forward_float32(const float* x, float* y, i64 n, i64 m, float gain, int threads) {
    forward(x, y, n, m, gain, threads);
}
void forward_bfloat16(const bf16* x, bf16* y, i64 n, i64 m, float gain, int threads) {
    forward(x, y, n, m, gain, threads);
}
void backward_float32(const float* x, const float* g, float* r, i64 n, i64 m, float gain, int threads) {
    backward(x, g, r, n, m, gain, threads);
}
void backward_bfloat16(const bf16* x, const bf16* g, bf16* r, i64 n, i64 m, float gain, int threads) {
    backward(x, g, r, n, m, gain, threads);
}
}
