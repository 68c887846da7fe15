/* Vector helpers that all C files of this folder share: fp32 arithmetic on 8 numbers at a time.

   GCC's vector extensions (clang has them too) become AVX2, AVX-512 or NEON instructions, so there is no code for one
   processor here. Matrices are row-major. Every function computes the same bits at each call. */
#pragma once

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* LANES: numbers in a vector. A tile of a product has ROWS x COLUMNS numbers: 12 vectors, which fit registers. */
enum { LANES = 8, ROWS = 6, COLUMNS = 16 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

static inline long min(long a, long b) { return a < b ? a : b; }
static inline long max(long a, long b) { return a > b ? a : b; }

static inline vec load(const float *x) { return *(const vec *)x; }
static inline void store(float *x, vec a) { *(vec *)x = a; }

/* Load n numbers; if n < LANES, `fill` stands for the missing ones. */
static inline vec load_part(const float *x, long n, float fill) {
    if (n >= LANES) return load(x);
    vec a = {fill, fill, fill, fill, fill, fill, fill, fill};
    memcpy(&a, x, n * sizeof(float));
    return a;
}

/* Store the first n numbers of a, at most LANES. */
static inline void store_part(float *x, vec a, long n) {
    if (n >= LANES)
        store(x, a);
    else
        memcpy(x, &a, n * sizeof(float));
}

/* a where `which` is true (all bits set), else b. */
static inline vec select_vec(ivec which, vec a, vec b) { return (vec)(((ivec)a & which) | ((ivec)b & ~which)); }

/* Sum of the 8 numbers. */
static inline float sum_vec(vec a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

/* a . b over n numbers. Four partial sums, because one addition has to wait four cycles for the last. */
static inline float dot(const float *a, const float *b, long n) {
    vec sum[4] = {{0}};
    long i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int u = 0; u < 4; u++) sum[u] += load(a + i + u * LANES) * load(b + i + u * LANES);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum_vec((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

/* e^x for x <= 0, relative error 2e-7: 2^whole through the exponent bits, the rest by its Taylor series. 0 below -87;
   NaN stays NaN. */
#define EXPONENTIAL(name, vec, ivec)                                                                                   \
    static inline vec name(vec x) {                                                                                    \
        ivec in_range = ~(x < -87); /* true for NaN too */                                                             \
        x = (vec)((ivec)x & in_range) * 1.44269504f;                                                                   \
        ivec whole = __builtin_convertvector(x - 0.5f, ivec);                                                          \
        vec r = (x - __builtin_convertvector(whole, vec)) * 0.693147181f;                                              \
        vec p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));      \
        return (vec)((ivec)(p * (vec)((whole + 127) << 23)) & in_range);                                               \
    }
EXPONENTIAL(exponential, vec, ivec)

/* Maximum of n scores and `best`. */
static inline float largest(const float *scores, long n, float best) {
    vec top = {best, best, best, best, best, best, best, best};
    for (long j = 0; j < n; j += LANES) {
        vec a = load_part(scores + j, n - j, best);
        top = select_vec(a > top, a, top);
    }
    for (int i = 0; i < LANES; i++) best = top[i] > best ? top[i] : best;
    return best;
}

/* SwiGLU of at most 8 numbers, n: y = silu(gate) up. Given the gradient dy, y and z become those of gate and up. */
static inline void gated(const float *gate, const float *up, const float *dy, float *y, float *z, long n) {
    const vec one = {1, 1, 1, 1, 1, 1, 1, 1};
    vec a = load_part(gate, n, 0), b = load_part(up, n, 0);
    vec e = exponential((vec)((ivec)a | INT_MIN)); /* e^-|a| cannot overflow */
    vec sigmoid = select_vec(a < 0, e, one) / (1 + e), silu = a * sigmoid;
    if (dy) {
        vec d = load_part(dy, n, 0);
        store_part(y, d * b * (sigmoid + silu * (1 - sigmoid)), n), store_part(z, d * silu, n);
    } else
        store_part(y, silu * b, n);
}

/* RMSNorm of one row: y = x / sqrt(mean(x^2) + eps) * w. x and y may be the same. */
static inline void norm_row(const float *x, const float *w, float *y, long n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

/* n rounded up to whole tiles. */
static inline long whole_columns(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* One tile of a matrix product: y (ROWS, COLUMNS) = a b, or y += a b with `add`. The sum is over n. Only the first
   `rows` rows of a and y exist. The next row of a is `a_row` on, its next number `a_step`. A number of a multiplies a
   whole vector of b, so nothing has to be summed across the lanes of a vector. `prefetch` the rows of the next tile
   where a is read from memory: it costs where a is in the cache. */
static inline __attribute__((always_inline)) void tile(const float *a, long a_row, long a_step, long rows,
                                                       const float *b, long b_row, long n, float *y, long y_row,
                                                       int add, int prefetch) {
    const float *ahead = a + ROWS * a_row, *a0 = a, *a1 = rows > 1 ? a0 + a_row : a0, *a2 = rows > 2 ? a1 + a_row : a1;
    const float *a3 = rows > 3 ? a2 + a_row : a2, *a4 = rows > 4 ? a3 + a_row : a3, *a5 = rows > 5 ? a4 + a_row : a4;
    vec s0 = {0}, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0, t4 = s0, t5 = s0;
    for (long i = 0; i < n * a_step; i += a_step, b += b_row) {
        if (prefetch) __builtin_prefetch(ahead), ahead += ROWS;
        vec u = load(b), v = load(b + LANES);
        s0 += u * a0[i], t0 += v * a0[i], s1 += u * a1[i], t1 += v * a1[i], s2 += u * a2[i], t2 += v * a2[i];
        s3 += u * a3[i], t3 += v * a3[i], s4 += u * a4[i], t4 += v * a4[i], s5 += u * a5[i], t5 += v * a5[i];
    }
    vec sums[ROWS][2] = {{s0, t0}, {s1, t1}, {s2, t2}, {s3, t3}, {s4, t4}, {s5, t5}};
    for (long r = 0; r < ROWS && r < rows; r++, y += y_row) {
        if (add) sums[r][0] += load(y), sums[r][1] += load(y + LANES);
        store(y, sums[r][0]), store(y + LANES, sums[r][1]);
    }
}
