/* Attention of a few queries over many keys, which a cache holds in any of its formats: the inner loops of
   cpu_decode.c. Keys and values become fp32 in registers, a vector at a time. */
#pragma once

#include "cpu_storage.h"

enum { BLOCK = 32, TAIL = 4 * UNIT }; /* keys at a time; bytes of a unit in the largest format */
#ifdef __AVX512F__
enum { MOST = 6 }; /* queries at a time: each key is read once for all of them, and their sums stay in registers */
#else
enum { MOST = 3 };
#endif

/* The sums of eight vectors as one, by halves. */
static inline vec sum_vecs(vec a, vec b, vec c, vec d, vec e, vec f, vec g, vec h) {
    a = SHUFFLE(a, e, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, e, 4, 5, 6, 7, 12, 13, 14, 15);
    b = SHUFFLE(b, f, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(b, f, 4, 5, 6, 7, 12, 13, 14, 15);
    c = SHUFFLE(c, g, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, g, 4, 5, 6, 7, 12, 13, 14, 15);
    d = SHUFFLE(d, h, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(d, h, 4, 5, 6, 7, 12, 13, 14, 15);
    a = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    c = SHUFFLE(c, d, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(a, c, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, c, 1, 3, 9, 11, 5, 7, 13, 15);
}

/* One vector that has the same sum. */
static inline vec folded(wide a) {
#ifdef __AVX512F__
    return (vec)_mm512_castps512_ps256((__m512)a) + (vec)_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)a, 1));
#else
    return (vec)a;
#endif
}

typedef struct { /* a block of a part's rows, as the kernels read them */
    const char *codes, *exact, *tail, *exact_tail; /* tail: copies of what is behind the last whole unit of a row */
    const float *scales, *offsets;                 /* (rows, groups); the offsets times the scales */
    long rows, step, exact_step, groups;           /* steps: bytes from row to row */
    long ahead;                                    /* bytes to rows that come later, to be fetched meanwhile */
} block;

/* n rounded down or up to whole units */
INLINE long whole_units(long n) { return n / UNIT * UNIT; }
INLINE long padded(long n) { return whole_units(n + UNIT - 1); }

/* Add to the sums (Q, K) of Q queries and K rows of x their products over n numbers of format f: whole units. */
INLINE void multiply(enum format f, int Q, int K, wide *sums, const float *q, long q_step, const char *x, long step,
                     const long *row, const float *scales, const float *offsets, long groups, long n, long ahead) {
    for (long i = 0; i < n; i += UNIT, q += UNIT) {
        const char *unit = x + bytes_of(f, i);
        for (long line = 0; line < K * bytes_of(f, UNIT); line += 64)
            __builtin_prefetch(x + row[0] * step + ahead + K * bytes_of(f, i) + line);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            wide own[MOST];
#pragma GCC unroll 8
            for (int u = 0; u < Q; u++) own[u] = *(const wide *)(q + u * q_step + h * WIDE);
#pragma GCC unroll 8
            for (int j = 0; j < K; j++) {
                long g = row[j] * groups + i / GROUP4;
                wide w = load_half(f, unit + row[j] * step, h, f == INT4 ? scales[g] : 1, f == INT4 ? offsets[g] : 0);
#pragma GCC unroll 8
                for (int u = 0; u < Q; u++) sums[u * K + j] += own[u] * w;
            }
        }
    }
}

/* p (Q, BLOCK) = q . k for Q queries and all keys of a block, K at a time, or p += that with `add`. The queries have n
   numbers for the codes of a key, then those for its exact ones, each padded with zeros to whole units. */
INLINE void dots(enum format f, int Q, int K, const block *k, const float *q, long q_step, long n, long exact, int add,
                 float *p) {
    long whole = whole_units(n), whole_exact = whole_units(exact), G = k->groups;
    const float *s = k->scales, *o = k->offsets, *q_exact = q + padded(n);
    for (long j = 0; j < k->rows; j += K) {
        long row[8];
        wide sums[24] = {{0}};
        float total[24];
#pragma GCC unroll 8
        for (int u = 0; u < K; u++) row[u] = min(j + u, k->rows - 1); /* rows that are missing of K are the last again */
        multiply(f, Q, K, sums, q, q_step, k->codes, k->step, row, s, o, G, whole, k->ahead);
        if (whole < n)
            multiply(f, Q, K, sums, q + whole, q_step, k->tail, TAIL, row, s + whole / GROUP4, o + whole / GROUP4, G, UNIT, 0);
        if (f == INT8 || f == FP8) {
#pragma GCC unroll 24
            for (int i = 0; i < Q * K; i++) sums[i] *= s[row[i % K] * G];
        }
        if (f >= INT8 && whole_exact)
            multiply(BF16, Q, K, sums, q_exact, q_step, k->exact, k->exact_step, row, s, o, G, whole_exact, 0);
        if (f >= INT8 && whole_exact < exact)
            multiply(BF16, Q, K, sums, q_exact + whole_exact, q_step, k->exact_tail, TAIL, row, s, o, G, UNIT, 0);
#pragma GCC unroll 4
        for (int i = 0; i < Q * K; i += 8) {
            int h = i + 4 < Q * K ? 4 : 0;
            const wide *a = sums + i;
            store(total + i, sum_vecs(folded(a[0]), folded(a[1]), folded(a[2]), folded(a[3]), folded(a[h]),
                                      folded(a[h + 1]), folded(a[h + 2]), folded(a[h + 3])));
        }
        for (int i = 0; i < Q; i++)
            for (int u = 0; u < K; u++) p[i * BLOCK + j + u] = total[i * K + u] + (add ? p[i * BLOCK + j + u] : 0);
    }
}

/* y (Q, T WIDE) = keep y + p v for Q queries and the first columns of a block of values. */
INLINE void mix(enum format f, int Q, int T, const block *v, const float *p, const float *keep, float *y, long y_step) {
    wide sums[24];
    const char *row = v->codes;
    const float *scale = v->scales, *offset = v->offsets;
#pragma GCC unroll 32
    for (int i = 0; i < Q * T; i++) sums[i] = *(const wide *)(y + i / T * y_step + i % T * WIDE) * keep[i / T];
    for (long r = 0; r < v->rows; r++, row += v->step, scale += v->groups, offset += v->groups) {
        for (long line = 0; line < bytes_of(f, T * WIDE); line += 64) __builtin_prefetch(row + v->ahead + line);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            int at = t / 2 * UNIT, g = at / GROUP4;
            wide w = load_half(f, row + bytes_of(f, at), t % 2, f == INT4 ? scale[g] : 1, f == INT4 ? offset[g] : 0);
#pragma GCC unroll 8
            for (int i = 0; i < Q; i++) sums[i * T + t] += w * p[i * BLOCK + r];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Q * T; i++) *(wide *)(y + i / T * y_step + i % T * WIDE) = sums[i];
}

/* `dots` and `mix` of n queries, as many at a time as fit, and then one; there may be two rows more of q, p and y. */
INLINE int how_many(long n) { return MOST == 6 && n > 3 ? 6 : n > 1 ? 3 : 1; }

#define KERNELS(F)                                                                                                     \
    static __attribute__((noinline)) void dots_##F(long queries, const block *k, const float *q, long step, long n,    \
                                                   long exact, int add, float *p) {                                    \
        for (int u; queries > 0; queries -= u, q += u * step, p += u * BLOCK) {                                        \
            u = how_many(queries);                                                                                     \
            if (u == 6) dots(F, MOST, 2, k, q, step, n, exact, add, p);                                                \
            if (u == 3) dots(F, 3, 4, k, q, step, n, exact, add, p);                                                   \
            if (u == 1) dots(F, 1, 8, k, q, step, n, exact, add, p);                                                   \
        }                                                                                                              \
    }                                                                                                                  \
    static __attribute__((noinline)) void mix_##F(long queries, const block *v, int four, const float *p,              \
                                                  const float *keep, float *y, long step) {                            \
        for (int u; queries > 0; queries -= u, p += u * BLOCK, keep += u, y += u * step) {                             \
            u = how_many(queries);                                                                                     \
            if (u == 6) four ? mix(F, MOST, 4, v, p, keep, y, step) : mix(F, MOST, 2, v, p, keep, y, step);            \
            if (u == 3) four ? mix(F, 3, 4, v, p, keep, y, step) : mix(F, 3, 2, v, p, keep, y, step);                  \
            if (u == 1) four ? mix(F, 1, 4, v, p, keep, y, step) : mix(F, 1, 2, v, p, keep, y, step);                  \
        }                                                                                                              \
    }
KERNELS(FP32)
KERNELS(BF16)
KERNELS(FP16)
KERNELS(INT8)
KERNELS(FP8)
KERNELS(INT4)
static void (*const DOTS[])(long, const block *, const float *, long, long, long, int, float *) = {
    dots_FP32, dots_BF16, dots_FP16, dots_INT8, dots_FP8, dots_INT4};
static void (*const MIX[])(long, const block *, int, const float *, const float *, float *, long) = {
    mix_FP32, mix_BF16, mix_FP16, mix_INT8, mix_FP8, mix_INT4};

/* Where number i of a vector is among its padded ones. */
INLINE long place(long format, long i) {
    return format == INT4 ? whole_units(i) + i % 2 * WIDE + i % UNIT / 2 : i;
}

/* Copies (rows, TAIL bytes) of what n numbers in each row have behind their whole units. */
static const char *tail_of(enum format f, const char *x, long step, long rows, long n, char *y) {
    long from = bytes_of(f, whole_units(n)), size = bytes_of(f, n) - from;
    memset(y, 0, size ? rows * TAIL : 0);
    for (long r = 0; size && r < rows; r++) memcpy(y + r * TAIL, x + r * step + from, size);
    return y;
}

/* Rows of a part, from number `row` on. scales: room for scales and offsets; tail: for those of codes and exact. */
static block block_of(const part *a, long row, long rows, long ahead, long n, float *scales, char *tail) {
    long step = bytes_of(a->format, a->width), exact_step = 2 * a->exact_width, g = a->groups, count = rows * g;
    float *offsets = scales + BLOCK * g;
    block b = {.codes = a->codes + row * step, .exact = a->exact + row * exact_step, .scales = scales, .offsets = offsets,
               .rows = rows, .step = step, .exact_step = exact_step, .groups = g, .ahead = ahead * step};
    b.tail = tail_of(a->format, b.codes, step, rows, n, tail);
    b.exact_tail = tail_of(BF16, b.exact, exact_step, rows, a->exact_width, tail + BLOCK * TAIL);
    if (!quantized(a)) return b;
    widen(BF16, a->scales + 2 * row * g, scales, count);
    if (a->format == INT4) widen(INT8, a->offsets + row * g, offsets, count);
    for (long i = 0; i < count; i++) a->format == INT4 ? (offsets[i] *= scales[i]) : (scales[i] *= a->format == FP8 ? 256 : 1);
    return b;
}

/* Numbers of room that n queries need, of keys and values of these widths. */
static long room_for(long n, long d, long dv) {
    long groups = d / GROUP4 + 1;
    return (n + 2) * (padded(d) + UNIT + padded(dv) + 2 * UNIT + 2 * BLOCK + 1) + BLOCK * (4 * groups + 2 * UNIT + 1);
}

/* Softmax over some of the keys, not yet divided by its sum, for n queries q (n, d):
   y (n, dv) = sum_j e^(score_j - top) v_j, sum (n) = sum_j e^(score_j - top), top (n) the largest score.
   Each block of 32 keys and values is read once for all queries ("online softmax", Milakov and Gimelshein 2018).
   The keys are rows of the parts k and v, from number `row` on. factor: NULL, or what multiplies the scores of query i,
   from number i `apart` on. room: see `room_for`. */
static void share_of_softmax(const float *q, const part *k, const part *v, long row, const part *factor, long first,
                             long apart, float *y, float *sum, float *top, float *room, long n, long keys, long dv,
                             float scale) {
    long d = k->width, exact = k->exact_width, step = padded(d) + padded(exact), y_step = padded(dv), f = k->format;
    float *own = room, *p = own + (n + 2) * step, *weights = p + (n + 2) * BLOCK, *out = weights + (n + 2) * BLOCK;
    float *k_scales = out + (n + 2) * y_step, *v_scales = k_scales + 2 * BLOCK * k->groups;
    float *tails = v_scales + 2 * BLOCK * v->groups, *factors = tails + 2 * BLOCK * UNIT, *keep = factors + BLOCK;
    memset(room, 0, (k_scales - room) * sizeof(float)), memset(keep, 0, (n + 2) * sizeof(float));
    for (long i = 0; i < n; i++) {
        for (long c = 0; c < d; c++) own[i * step + place(f, c)] = scale * q[i * (d + exact) + c];
        for (long c = 0; c < exact; c++) own[i * step + padded(d) + c] = scale * q[i * (d + exact) + d + c];
        sum[i] = 0, top[i] = -FLT_MAX;
    }
    for (long at = 0; at < keys; at += BLOCK) {
        long rows = min(keys - at, BLOCK), ahead = at + BLOCK < keys ? BLOCK : 0, one = f == INT8 || f == FP8;
        block a = block_of(k, row + at, rows, ahead, d, k_scales, (char *)tails);
        for (long c = 0; c < d; c += GROUP8, a.codes += GROUP8, a.scales++) { /* a scale at a time */
            long end = one ? min(c + GROUP8, d) : d;
            DOTS[f](n, &a, own + c, step, end - c, end == d ? exact : 0, c > 0, p);
            if (end == d) break;
        }
        for (long i = 0; i < n; i++) {
            float *r = p + i * BLOCK;
            if (factor) widen(factor->format, factor->codes + bytes_of(factor->format, first + i * apart + at), factors, rows);
            for (long j = 0; factor && j < rows; j++) r[j] *= factors[j];
            for (long j = rows; j < BLOCK; j++) r[j] = -FLT_MAX;
            float best = largest(r, BLOCK, top[i]);
            vec added = {0};
            for (long j = 0; j < BLOCK; j += LANES) {
                vec e = exponential(load(r + j) - best);
                store(r + j, e), added += e;
            }
            keep[i] = best > top[i] ? expf(top[i] - best) : 1, top[i] = best;
            sum[i] = sum[i] * keep[i] + sum_vec(added);
        }
        a = block_of(v, row + at, rows, ahead, dv, v_scales, (char *)tails);
        for (long c = 0; c < dv; c += 2 * UNIT) {
            block b = a;
            long left = dv - c, group = one ? c / GROUP8 : 0;
            if (one && c % GROUP8 == 0)
                for (long i = 0; i < n; i++)
                    for (long j = 0; j < rows; j++) weights[i * BLOCK + j] = p[i * BLOCK + j] * a.scales[j * a.groups + group];
            for (long u = 0; u < min(left, 2 * UNIT); u += UNIT) {
                int four = left >= 2 * UNIT;
                b.codes = a.codes + bytes_of(f, c + u), b.scales = a.scales + (c + u) / GROUP4;
                b.offsets = a.offsets + (c + u) / GROUP4;
                if (left - u < UNIT) b.codes = a.tail, b.step = TAIL, b.ahead = 0;
                MIX[f](n, &b, four, one ? weights : p, keep, out + c + u, y_step);
                if (four) break;
            }
        }
    }
    for (long i = 0; i < n; i++)
        for (long c = 0; c < dv; c++) y[i * dv + c] = out[i * y_step + place(f, c)];
}
