/* Attention of a few queries over many keys, in fp32: the inner loops of cpu_decode.c. */
#pragma once

#include "cpu.h"

enum { BLOCK = 32 }; /* keys at a time */

/* load, and keep the vector in a register: gcc would read memory again for each of its uses */
static inline vec load_once(const float *x) {
    vec y = load(x);
#ifdef __AVX__
    __asm__("" : "+x"(y));
#endif
    return y;
}

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

/* p_i[j] = scale * q_i . k_j for three queries and four keys. Each is loaded once for twelve sums: fewer sums would
   wait for their additions. `ahead` is four rows of keys that come later, to be fetched meanwhile. */
static __attribute__((noinline)) void dot3x4(const float *const *q, const float *const *k, const float *ahead, long n,
                                             float scale, float *const *p) {
    const float *a = q[0], *b = q[1], *c = q[2];
    vec a0 = {0}, a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0, c0 = a0, c1 = a0, c2 = a0, c3 = a0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(ahead + 4 * i), __builtin_prefetch(ahead + 4 * i + 16);
        vec x = load_once(a + i), y = load_once(b + i), z = load_once(c + i), w;
        w = load_once(k[0] + i), a0 += x * w, b0 += y * w, c0 += z * w;
        w = load_once(k[1] + i), a1 += x * w, b1 += y * w, c1 += z * w;
        w = load_once(k[2] + i), a2 += x * w, b2 += y * w, c2 += z * w;
        w = load_once(k[3] + i), a3 += x * w, b3 += y * w, c3 += z * w;
    }
    float sums[4][4]; /* a vector has those of two queries */
    store(sums[0], sum_vecs(a0, a1, a2, a3, b0, b1, b2, b3)), store(sums[2], sum_vecs(c0, c1, c2, c3, c0, c1, c2, c3));
    for (; i < n; i++)
        for (int j = 0; j < 4; j++)
            for (int u = 0; u < 3; u++) sums[u][j] += q[u][i] * k[j][i];
    for (int u = 0; u < 3; u++)
        for (int j = 0; j < 4; j++) p[u][j] = scale * sums[u][j]; /* stored last: several queries may be the same one */
}

/* y_i = keep_i * y_i + p_i v for three queries, `rows` rows of v and 32 of its columns. What is `ahead` of the rows is
   fetched meanwhile. */
static __attribute__((noinline)) void mix3(float *const *p, const float *v, long ahead, long step, long rows,
                                           const float *keep, float *const *y) {
    float *a = y[0], *b = y[1], *c = y[2], i = keep[0], j = keep[1], k = keep[2];
    vec a0 = load(a) * i, a1 = load(a + 8) * i, a2 = load(a + 16) * i, a3 = load(a + 24) * i;
    vec b0 = load(b) * j, b1 = load(b + 8) * j, b2 = load(b + 16) * j, b3 = load(b + 24) * j;
    vec c0 = load(c) * k, c1 = load(c + 8) * k, c2 = load(c + 16) * k, c3 = load(c + 24) * k;
    for (long r = 0; r < rows; r++, v += step) {
        __builtin_prefetch(v + ahead), __builtin_prefetch(v + ahead + 16);
        vec w;
        i = p[0][r], j = p[1][r], k = p[2][r];
        w = load_once(v), a0 += w * i, b0 += w * j, c0 += w * k;
        w = load_once(v + 8), a1 += w * i, b1 += w * j, c1 += w * k;
        w = load_once(v + 16), a2 += w * i, b2 += w * j, c2 += w * k;
        w = load_once(v + 24), a3 += w * i, b3 += w * j, c3 += w * k;
    }
    store(a, a0), store(a + 8, a1), store(a + 16, a2), store(a + 24, a3);
    store(b, b0), store(b + 8, b1), store(b + 16, b2), store(b + 24, b3);
    store(c, c0), store(c + 8, c1), store(c + 16, c2), store(c + 24, c3);
}

/* Softmax over some of the keys, not yet divided by its sum, for n queries q (n, d):
   y (n, dv) = sum_j e^(score_j - top) v_j, sum (n) = sum_j e^(score_j - top), top (n) the largest score.
   Each block of 32 keys and values is read once for all queries ("online softmax", Milakov and Gimelshein 2018).
   factor: NULL, or what multiplies each query's scores, rows `apart`. `room` has n (BLOCK + 1) numbers. */
static void share_of_softmax(const float *q, const float *k, const float *v, const float *factor, long apart, float *y,
                             float *sum, float *top, float *room, long n, long keys, long d, long dv, long step,
                             float scale) {
    float *p = room, *keep = room + n * BLOCK;
    memset(y, 0, n * dv * sizeof(float));
    for (long i = 0; i < n; i++) sum[i] = 0, top[i] = -FLT_MAX;
    for (long at = 0; at < keys; at += BLOCK, k += BLOCK * step, v += BLOCK * step) {
        long rows = min(keys - at, BLOCK), ahead = at + BLOCK < keys ? BLOCK * step : 0, c = 0;
        for (long j = 0; j < rows; j += 4) /* four keys stay in the L1 cache for all queries */
            for (long i = 0; i < n; i += 3) { /* queries that are missing of three are the last one again */
                long i1 = min(i + 1, n - 1), i2 = min(i + 2, n - 1);
                const float *queries[3] = {q + i * d, q + i1 * d, q + i2 * d}, *four[4];
                float *out[3] = {p + i * BLOCK + j, p + i1 * BLOCK + j, p + i2 * BLOCK + j};
                for (long u = 0; u < 4; u++) four[u] = k + min(j + u, rows - 1) * step;
                dot3x4(queries, four, four[0] + ahead, d, scale, out);
            }
        for (long i = 0; i < n; i++) {
            float *row = p + i * BLOCK;
            for (long j = 0; factor && j < rows; j++) row[j] *= factor[i * apart + at + j];
            for (long j = rows; j < BLOCK; j++) row[j] = -FLT_MAX;
            float best = largest(row, BLOCK, top[i]);
            vec added = {0};
            for (long j = 0; j < BLOCK; j += LANES) {
                vec e = exponential(load(row + j) - best);
                store(row + j, e), added += e;
            }
            keep[i] = best > top[i] ? expf(top[i] - best) : 1, top[i] = best;
            sum[i] = sum[i] * keep[i] + sum_vec(added);
        }
        for (; c + 4 * LANES <= dv; c += 4 * LANES) /* 32 columns of the values stay in the L1 cache */
            for (long i = 0; i < n; i += 3) {
                long i1 = min(i + 1, n - 1), i2 = min(i + 2, n - 1);
                float *out[3] = {y + i * dv + c, y + i1 * dv + c, y + i2 * dv + c};
                float kept[3] = {keep[i], keep[i1], keep[i2]};
                mix3((float *[]){p + i * BLOCK, p + i1 * BLOCK, p + i2 * BLOCK}, v + c, ahead, step, rows, kept, out);
            }
        for (; c < dv; c++)
            for (long i = 0; i < n; i++) {
                float total = keep[i] * y[i * dv + c];
                for (long j = 0; j < rows; j++) total += p[i * BLOCK + j] * v[j * step + c];
                y[i * dv + c] = total;
            }
    }
}
