/* Attention of a few queries over many keys, which a cache holds in any of its formats: the inner loops of
   cpu_decode.c. Keys and values become fp32 in registers, a vector at a time. */
#pragma once

#include "cpu_storage.h"

/* Keys at a time, in a kernel at least, and to fetch ahead; bytes of a unit of fp32. */
enum { BLOCK = 128, FEWEST = 16, AHEAD = 32, TAIL = 4 * UNIT };
#ifdef __AVX512BW__
enum { MOST = 6 }; /* queries at a time: each key is read once for all of them, and their sums stay in registers */
#else
enum { MOST = 3 };
#endif
#define LIFT 0x1p60f /* half of what FP8 codes lack goes to the query or the result, half to the scale */

/* The sums of WIDE vectors as one, by halves. */
#ifdef __AVX512BW__
#define HALVES(shuffle, a, b, low, high) (_mm512_##shuffle(a, b, low) + _mm512_##shuffle(a, b, high))
INLINE wide sums_of(const wide *x) {
    const __m512 *a = (const __m512 *)x;
    __m512 y[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        __m512 c = HALVES(shuffle_f32x4, a[k], a[4 + k], 0x44, 0xee);
        __m512 d = HALVES(shuffle_f32x4, a[8 + k], a[12 + k], 0x44, 0xee);
        y[k] = HALVES(shuffle_f32x4, c, d, 0x88, 0xdd);
    }
    y[0] = HALVES(shuffle_ps, y[0], y[1], 0x44, 0xee), y[2] = HALVES(shuffle_ps, y[2], y[3], 0x44, 0xee);
    return (wide)HALVES(shuffle_ps, y[0], y[2], 0x88, 0xdd);
}
#else
INLINE wide sums_of(const wide *x) {
    wide y[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
        y[k] = SHUFFLE(x[k], x[4 + k], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(x[k], x[4 + k], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int k = 0; k < 4; k += 2)
        y[k] = SHUFFLE(y[k], y[k + 1], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(y[k], y[k + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(y[0], y[2], 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(y[0], y[2], 1, 3, 9, 11, 5, 7, 13, 15);
}
#endif

/* The two halves of a, or a and b. */
static inline vec lower(wide a) {
#ifdef __AVX512BW__
    return (vec)_mm512_castps512_ps256((__m512)a);
#else
    return (vec)a;
#endif
}

static inline vec upper(wide a, vec b) {
#ifdef __AVX512BW__
    b = (vec)_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)a, 1));
#endif
    (void)a;
    return b;
}

static inline wide select_wide(iwide which, wide a, wide b) { return (wide)(((iwide)a & which) | ((iwide)b & ~which)); }
static inline vec larger(vec a, vec b) { return select_vec(a > b, a, b); }

static inline float largest_of(wide x) {
    vec a = larger(lower(x), upper(x, lower(x)));
    a = larger(a, SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3)), a = larger(a, SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    return larger(a, SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6))[0];
}

EXPONENTIAL(exponential_wide, wide, iwide)

typedef struct { /* a block of a part's rows, as the kernels read them */
    const char *codes, *exact, *tail, *exact_tail; /* tail: copies of what is behind the last whole unit of a row */
    const float *scales, *offsets; /* of INT4 (rows, groups), the offsets times the scales; else (groups, BLOCK) */
    long rows, step, exact_step, groups;           /* steps: bytes from row to row */
    long ahead;                                    /* rows until those that are to be fetched meanwhile */
} block;

/* n rounded down or up to whole units */
INLINE long whole_units(long n) { return n / UNIT * UNIT; }
INLINE long padded(long n) { return whole_units(n + UNIT - 1); }

/* Add to the sums (Q, K) of Q queries and K rows of x their products over n numbers of format f. */
INLINE void multiply(enum format f, int Q, int K, wide *sums, const float *q, const char *x, long step,
                     const char *tail, const float *scales, const float *offsets, long groups, long n, long ahead) {
    for (long i = 0, whole = whole_units(n), end; i < n; x = tail, step = TAIL, ahead = 0) { /* twice, if with a tail */
        end = i < whole ? whole : n, x = i < whole ? x : tail, step = i < whole ? step : TAIL;
        for (const char *unit = x; i < end; i += UNIT, unit += bytes_of(f, UNIT), q += Q * UNIT) {
            for (long line = 0; line < K * bytes_of(f, UNIT); line += 64)
                __builtin_prefetch(x + ahead * step + K * (unit - x) + line);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                wide own[MOST];
#pragma GCC unroll 8
                for (int u = 0; u < Q; u++) own[u] = load_once(q + (h * Q + u) * WIDE);
#pragma GCC unroll 8
                for (int j = 0; j < K; j++) {
                    long g = j * groups + i / GROUP4;
                    wide w = load_half(f, unit + j * step, h, f == INT4 ? scales[g] : 1, f == INT4 ? offsets[g] : 0);
#pragma GCC unroll 8
                    for (int u = 0; u < Q; u++) sums[u * K + j] += own[u] * w;
                }
            }
        }
    }
}

/* p (Q, BLOCK) = q . k for Q queries and all keys of a block, at least FEWEST, K at a time. The queries have n numbers
   for the codes of a key, then those for its exact ones if it has some, each padded with zeros to whole units. */
INLINE void dots(enum format f, int Q, int K, int has_exact, const block *k, const float *q, long n, float *p) {
    const int parts = Q > 1 || f == INT4 ? 1 : WIDE / K; /* of K keys: as many sums at once as a vector has numbers */
    for (long at = 0; at < k->rows; at += parts * K) {
        long j = min(at, k->rows - parts * K); /* the last keys may be the second time's */
        wide sums[24] = {{0}};
        float total[32];
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            wide *to = sums + part * K;
            long row = j + part * K, exact_row = row * k->exact_step;
            const float *scales = k->scales + row * (f == INT4 ? k->groups : 1);
            const float *offsets = k->offsets + row * k->groups;
            multiply(f, Q, K, to, q, k->codes + row * k->step, k->step, k->tail + row * TAIL, scales, offsets,
                     k->groups, n, k->ahead);
            if (!has_exact) continue;
#pragma GCC unroll 24
            for (int i = 0; i < Q * K; i++) to[i] *= f == INT4 ? 1 : scales[i % K];
            multiply(BF16, Q, K, to, q + Q * padded(n), k->exact + exact_row, k->exact_step,
                     k->exact_tail + row * TAIL, NULL, NULL, 0, k->exact_step / 2, k->ahead);
        }
#pragma GCC unroll 4
        for (int i = 0; i < Q * K * parts; i += WIDE) {
            wide a[WIDE];
#pragma GCC unroll 16
            for (int u = 0; u < WIDE; u++) a[u] = sums[i + u < Q * K * parts ? i + u : 0];
            *(wide *)(total + i) = sums_of(a);
        }
        for (int i = 0; i < Q; i++) memcpy(p + i * BLOCK + j, total + i * K, K * parts * sizeof(float));
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
        const char *later = row + v->ahead * v->step;
        for (long line = 0; line < bytes_of(f, T * WIDE); line += 64) __builtin_prefetch(later + line);
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

#define DOT(F, Q, K)                                                                                                   \
    F >= INT8 && exact ? dots(F, Q, K, 1, k, q + Q * from, n, p) : dots(F, Q, K, 0, k, q + Q * from, n, p)
#define KERNELS(F)                                                                                                     \
    static __attribute__((noinline)) void dots_##F(long queries, const block *k, const float *q, long step, long from, \
                                                   long n, int exact, float *p) {                                      \
        for (int u; queries > 0; queries -= u, q += u * step, p += u * BLOCK) {                                        \
            u = how_many(queries);                                                                                     \
            if (u == 6) DOT(F, MOST, 2);                                                                               \
            if (u == 3) DOT(F, 3, MOST == 3 && F >= FP8 ? 2 : 4);                                                      \
            if (u == 1) DOT(F, 1, MOST == 3 && F == INT4 ? 4 : 8);                                                     \
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
    return format >= FP8 ? whole_units(i) + i % 2 * WIDE + i % UNIT / 2 : i;
}

/* Copies (rows, TAIL bytes) of what n numbers in each row have behind their whole units. */
static const char *tail_of(enum format f, const char *x, long step, long rows, long n, char *y) {
    long from = bytes_of(f, whole_units(n)), size = bytes_of(f, n) - from;
    memset(y, 0, size ? rows * TAIL : 0);
    for (long r = 0; size && r < rows; r++) memcpy(y + r * TAIL, x + r * step + from, size);
    return y;
}

typedef struct { /* what the attention of n queries works on; there are two more of them than n, see `how_many` */
    float *q, *p, *weights, *out; /* padded queries, scores, these times the scales of values, padded results */
    float *scales, *offsets, *factors, *keep, *few;
    float *tails;
    long q_step, y_step, size; /* numbers from query to query; of all */
} workspace;

/* It begins at `room`, or is only measured. d, dv: widths of keys and values. */
static workspace divide_room(float *room, long n, long d, long dv) {
    long groups = d / GROUP4 + 1;
    workspace w = {.q_step = padded(d) + UNIT, .y_step = padded(dv)};
    struct { float **part; long size; } parts[] = {
        {&w.q, (n + 2) * w.q_step}, {&w.out, (n + 2) * w.y_step}, {&w.p, (n + 2) * BLOCK},
        {&w.weights, (n + 2) * BLOCK},
        {&w.scales, groups * BLOCK + WIDE}, {&w.offsets, groups * BLOCK + WIDE}, {&w.factors, BLOCK},
        {&w.keep, n + 2}, {&w.few, FEWEST * d}, {&w.tails, 2 * BLOCK * TAIL / 4}};
    for (int i = 0; i < 10; i++) *parts[i].part = room ? room + w.size : NULL, w.size += whole_columns(parts[i].size);
    return w;
}

/* Rows of a part, from number `row` on, of which n numbers count. */
static block block_of(const part *a, long row, long rows, long ahead, long n, const workspace *w) {
    long step = bytes_of(a->format, a->width), exact_step = 2 * a->exact_width, G = a->groups;
    block b = {.codes = a->codes + row * step, .exact = a->exact + row * exact_step, .scales = w->scales, .rows = rows,
               .offsets = w->offsets, .step = step, .exact_step = exact_step, .groups = G, .ahead = ahead};
    b.tail = tail_of(a->format, b.codes, step, rows, n, (char *)w->tails);
    b.exact_tail = tail_of(BF16, b.exact, exact_step, rows, a->exact_width, (char *)w->tails + BLOCK * TAIL);
    float *first = G > 1 && a->format != INT4 ? w->offsets : w->scales; /* there, to be transposed */
    if (quantized(a)) widen(BF16, a->scales + 2 * row * G, first, rows * G);
    for (long i = 0; a->format == FP8 && i < rows * G; i++) first[i] *= LIFT;
    for (long i = 0; first != w->scales && i < rows * G; i++) w->scales[i % G * BLOCK + i / G] = first[i];
    if (a->format != INT4) return b;
    widen(INT8, a->offsets + row * G, w->offsets, rows * G);
    for (long i = 0; i < rows * G; i += WIDE) *(wide *)(w->offsets + i) *= *(wide *)(w->scales + i);
    return b;
}

/* The scores of a block of keys. factor: of the scores of the first query, from this number on; or NULL. */
static void score(const part *k, block b, const part *factor, long number, long apart, const workspace *w, long n) {
    long one = k->format == INT8 || k->format == FP8, size = one ? GROUP8 : k->width, rows = b.rows;
    if (rows < FEWEST) { /* copies, with room for more */
        char *exact = (char *)w->few + FEWEST * b.step;
        b.codes = memcpy(w->few, b.codes, rows * b.step), b.rows = FEWEST, b.ahead = 0;
        if (k->exact_width) b.exact = memcpy(exact, b.exact, rows * b.exact_step);
    }
    for (long c = 0; c < k->width; c += size, b.codes += GROUP8, b.scales += BLOCK) { /* numbers with one scale */
        int exact = k->exact_width && c + size >= k->width;
        float *y = c ? w->weights : w->p; /* weights are not in use yet */
        DOTS[k->format](n, &b, w->q, w->q_step, c, min(size, k->width - c), exact, y);
        for (long i = 0; one && !exact && i < n; i++)
            for (long j = 0; j < BLOCK; j++) y[i * BLOCK + j] *= b.scales[j];
        for (long i = 0; c && i < n * BLOCK; i++) w->p[i] += y[i];
    }
    for (long i = 0; factor && i < n; i++) {
        widen(factor->format, factor->codes + bytes_of(factor->format, number + i * apart), w->factors, rows);
        for (long j = 0; j < BLOCK; j++) w->p[i * BLOCK + j] *= w->factors[j];
    }
}

/* p = e^(p - top) for the scores of some keys, with the top and the sum of those before; returns what these have to be
   multiplied by, now that the top is another. */
static float softmax(float *p, long rows, float *sum, float *top) {
    long n = (rows + WIDE - 1) / WIDE;
    for (long j = rows; j < n * WIDE; j++) p[j] = -FLT_MAX;
    wide *x = (wide *)p, most = x[0], added = {0};
    for (long j = 1; j < n; j++) most = select_wide(x[j] > most, x[j], most);
    float best = fmaxf(largest_of(most), *top), keep = best > *top ? expf(*top - best) : 1;
    for (long j = 0; j < n; j++) x[j] = exponential_wide(x[j] - best), added += x[j];
    *top = best, *sum = *sum * keep + sum_vec(lower(added) + upper(added, (vec){0}));
    return keep;
}

/* out = keep out + p v, for a block of values */
static void add_values(const part *v, const block *a, const workspace *w, long n, long dv) {
    long f = v->format, one = f == INT8 || f == FP8;
    for (long c = 0, width; c < dv; c += width) { /* columns */
        block b = *a;
        int fits = MOST == 6 ? n < 4 || f != FP8 : n < 2 || (f > FP32 && f < FP8); /* in the registers */
        int four = fits && c + 2 * UNIT <= dv;
        width = four ? 2 * UNIT : UNIT;
        for (long i = 0; one && c % GROUP8 == 0 && i < n; i++)
            for (long j = 0; j < BLOCK; j++)
                w->weights[i * BLOCK + j] = w->p[i * BLOCK + j] * w->scales[c / GROUP8 * BLOCK + j];
        b.codes += bytes_of(f, c), b.scales += c / GROUP4, b.offsets += c / GROUP4;
        if (dv - c < UNIT) b.codes = a->tail, b.step = TAIL, b.ahead = 0;
        MIX[f](n, &b, four, one ? w->weights : w->p, w->keep, w->out + c, w->y_step);
    }
}

/* Softmax over some of the keys, not yet divided by its sum, for n queries q (n, d):
   y (n, dv) = sum_j e^(score_j - top) v_j, sum (n) = sum_j e^(score_j - top), top (n) the largest score.
   Each block of keys and values is read once for all queries ("online softmax", Milakov and Gimelshein 2018).
   The keys are rows of the parts k and v, from number `row` on. factor: NULL, or what multiplies the scores, those of
   the first query from this number on, of the next `apart` numbers later. room: for a workspace. */
static void share_of_softmax(const float *q, const part *k, const part *v, long row, const part *factor, long number,
                             long apart, float *y, float *sum, float *top, float *room, long n, long keys, long dv,
                             float scale) {
    long d = k->width, exact = k->exact_width, f = k->format;
    float lift = f == FP8 ? LIFT : 1;
    workspace w = divide_room(room, n, d + exact, dv);
    memset(w.q, 0, (n + 2) * w.q_step * sizeof(float)), memset(w.p, 0, (n + 2) * BLOCK * sizeof(float));
    memset(w.out, 0, (n + 2) * w.y_step * sizeof(float)), memset(w.keep, 0, (n + 2) * sizeof(float));
    for (long i = 0, first = 0, Q = how_many(n); i < n; i++, q += d + exact) {
        if (i == first + Q) first = i, Q = how_many(n - i);
        for (long c = 0; c < d + exact; c++) { /* vectors of Q queries in turn, as `multiply` reads them */
            long at = c < d ? place(f, c) : padded(d) + c - d;
            w.q[first * w.q_step + (at / WIDE * Q + i - first) * WIDE + at % WIDE] = (c < d ? lift : 1) * scale * q[c];
        }
        sum[i] = 0, top[i] = -FLT_MAX;
    }
    for (long at = 0; at < keys; at += BLOCK) {
        long rows = min(keys - at, BLOCK), ahead = at + BLOCK < keys ? AHEAD : 0;
        block a = block_of(k, row + at, rows, ahead, d, &w);
        score(k, a, factor, number + at, apart, &w, n);
        for (long i = 0; i < n; i++) w.keep[i] = softmax(w.p + i * BLOCK, rows, sum + i, top + i);
        if (v->codes != k->codes || dv % UNIT) a = block_of(v, row + at, rows, ahead, dv, &w);
        add_values(v, &a, &w, n, dv);
    }
    for (long i = 0; i < n; i++)
        for (long c = 0; c < dv; c++) y[i * dv + c] = w.out[i * w.y_step + place(f, c)] * lift;
}
