/* What model.py computes on a CPU, in fp32, by all cores: what a layer makes of the next token of each row; then those
   operators of training for which torch makes many passes over memory; at the end, all of training by a tape of such
   operators. native.py compiles it; it and tape.py call it.

   A decoding step at batch 1 reads every weight for one multiplication each, so it is bound by reading; through torch,
   whose operators each cost as much as what they compute here, by their number. At larger batches a BLAS would first
   copy every matrix into the order it likes, which costs as much as multiplying.

   Matrices are row-major; `step` is from one row to the next. The work is cut the same way at a given number of
   threads, so results repeat to the last bit. What returns an int returns 1 if there is no memory, else 0. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, BLOCK = 32, ROWS = 6, COLUMNS = 16, QUERIES = 24, SHARES = 64 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

static vec load(const float *x) { return *(const vec *)x; }
static void store(float *x, vec a) { *(vec *)x = a; }

/* x, or of less than a vector what there is, filled up */
static vec part(const float *x, long n, float fill) {
    if (n >= LANES) return load(x);
    vec a = {fill, fill, fill, fill, fill, fill, fill, fill};
    memcpy(&a, x, n * sizeof(float));
    return a;
}

static void put(float *x, vec a, long n) {
    if (n >= LANES)
        store(x, a);
    else
        memcpy(x, &a, n * sizeof(float));
}

static vec either(ivec which, vec a, vec b) { return (vec)(((ivec)a & which) | ((ivec)b & ~which)); }

static float total(vec a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

/* load, into a register: gcc would rather load again for the next multiplication */
static vec once(const float *x) {
    vec y = load(x);
#ifdef __AVX__
    __asm__("" : "+x"(y));
#endif
    return y;
}

/* the totals of eight vectors, by halves: of 8 x 8 numbers 8 x 4, 8 x 2 and 8 remain */
static vec totals(vec a, vec b, vec c, vec d, vec e, vec f, vec g, vec h) {
    a = SHUFFLE(a, e, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, e, 4, 5, 6, 7, 12, 13, 14, 15);
    b = SHUFFLE(b, f, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(b, f, 4, 5, 6, 7, 12, 13, 14, 15);
    c = SHUFFLE(c, g, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, g, 4, 5, 6, 7, 12, 13, 14, 15);
    d = SHUFFLE(d, h, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(d, h, 4, 5, 6, 7, 12, 13, 14, 15);
    a = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    c = SHUFFLE(c, d, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(a, c, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, c, 1, 3, 9, 11, 5, 7, 13, 15);
}

/* a . b; four sums at a time, as an addition takes four cycles */
static float dot(const float *a, const float *b, long n) {
    vec sum[4] = {{0}};
    long i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int u = 0; u < 4; u++) sum[u] += load(a + i + u * LANES) * load(b + i + u * LANES);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

/* p_i[j] = scale * q_i . k_j for three q and four k, each loaded once: twelve sums, as two at a time take four cycles.
   `ahead`, four rows that come later, is asked for meanwhile. */
static __attribute__((noinline)) void dot3x4(const float *const *q, const float *const *k, const float *ahead, long n,
                                             float scale, float *const *p) {
    const float *a = q[0], *b = q[1], *c = q[2];
    vec a0 = {0}, a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0, c0 = a0, c1 = a0, c2 = a0, c3 = a0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(ahead + 4 * i), __builtin_prefetch(ahead + 4 * i + 16);
        vec x = once(a + i), y = once(b + i), z = once(c + i), w;
        w = once(k[0] + i), a0 += x * w, b0 += y * w, c0 += z * w;
        w = once(k[1] + i), a1 += x * w, b1 += y * w, c1 += z * w;
        w = once(k[2] + i), a2 += x * w, b2 += y * w, c2 += z * w;
        w = once(k[3] + i), a3 += x * w, b3 += y * w, c3 += z * w;
    }
    float sums[4][4]; /* two queries are a vector */
    store(sums[0], totals(a0, a1, a2, a3, b0, b1, b2, b3)), store(sums[2], totals(c0, c1, c2, c3, c0, c1, c2, c3));
    for (; i < n; i++)
        for (int j = 0; j < 4; j++)
            for (int u = 0; u < 3; u++) sums[u][j] += q[u][i] * k[j][i];
    for (int u = 0; u < 3; u++)
        for (int j = 0; j < 4; j++) p[u][j] = scale * sums[u][j]; /* last: some queries may be one */
}

/* y_i = keep_i * y_i + p_i v for three i and `rows` rows of v, 32 columns; what is `ahead` of them is asked for */
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
        w = once(v), a0 += w * i, b0 += w * j, c0 += w * k;
        w = once(v + 8), a1 += w * i, b1 += w * j, c1 += w * k;
        w = once(v + 16), a2 += w * i, b2 += w * j, c2 += w * k;
        w = once(v + 24), a3 += w * i, b3 += w * j, c3 += w * k;
    }
    store(a, a0), store(a + 8, a1), store(a + 16, a2), store(a + 24, a3);
    store(b, b0), store(b + 8, b1), store(b + 16, b2), store(b + 24, b3);
    store(c, c0), store(c + 8, c1), store(c + 16, c2), store(c + 24, c3);
}

/* e^x for x <= 0, to 2e-7: 2^whole by its bits, the rest by its series; 0 below -87 */
static vec exponential(vec x) {
    ivec in_range = ~(x < -87); /* of nan too, which stays nan */
    x = (vec)((ivec)x & in_range) * 1.44269504f;
    ivec whole = __builtin_convertvector(x - 0.5f, ivec);
    vec r = (x - __builtin_convertvector(whole, vec)) * 0.693147181f;
    vec p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return (vec)((ivec)(p * (vec)((whole + 127) << 23)) & in_range);
}

/* a vector of silu(g) u at y or, with its gradient at dy, those of g and u at y and z; n numbers are left */
static void gated(const float *g, const float *u, const float *dy, float *y, float *z, long n) {
    const vec one = {1, 1, 1, 1, 1, 1, 1, 1};
    vec a = part(g, n, 0), b = part(u, n, 0), e = exponential((vec)((ivec)a | INT_MIN)); /* of -|a|: no overflow */
    vec sigmoid = either(a < 0, e, one) / (1 + e), silu = a * sigmoid;
    if (dy) {
        vec d = part(dy, n, 0);
        put(y, d * b * (sigmoid + silu * (1 - sigmoid)), n), put(z, d * silu, n);
    } else
        put(y, silu * b, n);
}

/* y = silu(g) u or, with its gradient in dy, y and z the gradients of g and u */
void swiglu(const float *g, const float *u, const float *dy, float *y, float *z, long n) {
#pragma omp parallel for schedule(static) if (n > 1 << 13)
    for (long i = 0; i < n; i += LANES) gated(g + i, u + i, dy ? dy + i : NULL, y + i, z + i, n - i);
}

static void norm_row(const float *x, const float *w, float *y, long n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

/* y = x / rms(x) * w of each row */
void norm(const float *x, const float *w, float *y, long rows, long n, float eps) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 15)
    for (long r = 0; r < rows; r++) norm_row(x + r * n, w, y + r * n, n, eps);
}

/* the first `width` numbers of each row of x, `step` apart, turned by RoPE as model.rotate does, or back for a sign
   of -1 */
static void rotate(float *x, const float *cosine, const float *sine, long rows, long step, long width, float sign) {
    for (long half = width / 2; rows--; x += step)
        for (long i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] + sign * b * sine[i];
            x[i + half] = b * cosine[i + half] + sign * a * sine[i + half];
        }
}

/* y (ROWS, COLUMNS), or with `add` what is added to it, = a b over n; of a and y there are only the first `rows` rows.
   Each number of a, `a_row` and `a_step` from the next, multiplies a vector of b: nothing is summed across vectors. */
static inline __attribute__((always_inline)) void tile_of(const float *a, long a_row, long a_step, long rows,
                                                          const float *b, long b_row, long n, float *y, long y_row,
                                                          int add) {
    const float *ahead = a + ROWS * a_row, *a0 = a, *a1 = rows > 1 ? a0 + a_row : a0, *a2 = rows > 2 ? a1 + a_row : a1;
    const float *a3 = rows > 3 ? a2 + a_row : a2, *a4 = rows > 4 ? a3 + a_row : a3, *a5 = rows > 5 ? a4 + a_row : a4;
    vec s0 = {0}, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0, t4 = s0, t5 = s0;
    for (long i = 0; i < n * a_step; i += a_step, b += b_row) {
        __builtin_prefetch(ahead), ahead += ROWS; /* the next rows, if they follow */
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

static void tile(const float *a, long a_row, long a_step, long rows, const float *b, long b_row, long n, float *y,
                 long y_row, int add) {
    if (a_step == 1)
        tile_of(a, a_row, 1, rows, b, b_row, n, y, y_row, add);
    else
        tile_of(a, a_row, a_step, rows, b, b_row, n, y, y_row, add);
}

static long whole_columns(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* how many numbers x (batch, n) has in the order in which `linear` multiplies it */
long packed(long batch, long n) { return whole_columns(batch) * n; }

/* y = x W^T, or plus + x W^T: x (batch, n), w (rows, n), y and plus (batch, rows). In `room`, of packed(batch, n)
   numbers, x becomes (packed batch / COLUMNS, n, COLUMNS), with the last row as often as there are columns left. */
void linear(const float *w, const float *x, const float *plus, float *y, float *room, long batch, long rows, long n) {
    if (batch == 1) {
#pragma omp parallel for schedule(static)
        for (long r = 0; r < rows; r++) y[r] = (plus ? plus[r] : 0) + dot(w + r * n, x, n);
        return;
    }
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            for (long c = 0; c < batch; c += COLUMNS)
                for (long u = 0; u < COLUMNS; u++)
                    room[c * n + i * COLUMNS + u] = x[(c + u < batch ? c + u : batch - 1) * n + i];
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r += ROWS)
            for (long c = 0; c < batch; c += COLUMNS) {
                float sums[ROWS][COLUMNS];
                tile(w + r * n, n, 1, rows - r, room + c * n, COLUMNS, n, sums[0], COLUMNS, 0);
                for (long b = c; b < batch && b < c + COLUMNS; b++)
                    for (long i = r; i < rows && i < r + ROWS; i++)
                        y[b * rows + i] = (plus ? plus[b * rows + i] : 0) + sums[i - r][b - c];
            }
    }
}

/* y = x + down (silu(gate h) * up h), h = norm(x), of each row of x (batch, n) */
int mlp(const float *x, const float *norm_w, const float *gate, const float *up, const float *down, float *y,
        long batch, long n, long inner, float eps) {
    long more = packed(batch, n > inner ? n : inner);
    float *h = malloc((batch * (n + 2 * inner) + more) * sizeof(float));
    if (!h) return 1;
    float *g = h + batch * n, *u = g + batch * inner, *room = u + batch * inner;
    norm(x, norm_w, h, batch, n, eps);
    linear(gate, h, NULL, g, room, batch, inner, n);
    linear(up, h, NULL, u, room, batch, inner, n);
    swiglu(g, u, NULL, g, NULL, batch * inner);
    linear(down, g, x, y, room, batch, n, inner);
    free(h);
    return 0;
}

/* of n scores and one more */
static float largest(const float *scores, long n, float best) {
    vec top = part(&best, 1, best);
    for (long j = 0; j < n; j += LANES) {
        vec a = part(scores + j, n - j, best);
        top = either(a > top, a, top);
    }
    for (int i = 0; i < LANES; i++) best = top[i] > best ? top[i] : best;
    return best;
}

/* Of a softmax over some keys: sum_j e^(score_j - top) v_j (n, dv), and sum_j e^(score_j - top) and top (n), for n
   queries q (n, d), three at a time, the last perhaps more than once. A block of keys and values is read once, for all
   of them ("online softmax", Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). */
static void share(const float *q, const float *k, const float *v, float *y, float *sum, float *top, long n, long keys,
                  long d, long dv, long step, float scale) {
    float p[n][BLOCK], keep[n];
    memset(y, 0, n * dv * sizeof(float));
    for (long i = 0; i < n; i++) sum[i] = 0, top[i] = -FLT_MAX;
    for (long at = 0; at < keys; at += BLOCK, k += BLOCK * step, v += BLOCK * step) {
        long rows = keys - at < BLOCK ? keys - at : BLOCK, ahead = at + BLOCK < keys ? BLOCK * step : 0, c = 0;
        for (long j = 0; j < rows; j += 4) /* four keys, then 32 columns of the values, stay in the L1 cache */
            for (long i = 0; i < n; i += 3) {
                long i1 = i + 1 < n ? i + 1 : i, i2 = i + 2 < n ? i + 2 : i;
                const float *queries[3] = {q + i * d, q + i1 * d, q + i2 * d}, *four[4];
                for (long u = 0; u < 4; u++) four[u] = k + (j + u < rows ? j + u : j) * step;
                dot3x4(queries, four, four[0] + ahead, d, scale, (float *[]){p[i] + j, p[i1] + j, p[i2] + j});
            }
        for (long i = 0; i < n; i++) {
            for (long j = rows; j < BLOCK; j++) p[i][j] = -FLT_MAX;
            float best = largest(p[i], BLOCK, top[i]);
            vec added = {0};
            for (long j = 0; j < BLOCK; j += LANES) {
                vec e = exponential(load(&p[i][j]) - best);
                store(&p[i][j], e);
                added += e;
            }
            keep[i] = best > top[i] ? expf(top[i] - best) : 1, top[i] = best;
            sum[i] = sum[i] * keep[i] + total(added);
        }
        for (; c + 4 * LANES <= dv; c += 4 * LANES)
            for (long i = 0; i < n; i += 3) {
                long i1 = i + 1 < n ? i + 1 : i, i2 = i + 2 < n ? i + 2 : i;
                float *out[3] = {y + i * dv + c, y + i1 * dv + c, y + i2 * dv + c};
                float kept[3] = {keep[i], keep[i1], keep[i2]};
                mix3((float *[]){p[i], p[i1], p[i2]}, v + c, ahead, step, rows, kept, out);
            }
        for (; c < dv; c++)
            for (long i = 0; i < n; i++) {
                float s = keep[i] * y[i * dv + c];
                for (long j = 0; j < rows; j++) s += p[i][j] * v[j * step + c];
                y[i * dv + c] = s;
            }
    }
}

/* softmax(scale q k^T) v of each group: q (groups, n, d), k (groups, keys, d), v (groups, keys, dv) -> y like q.
   `group`: from one group's keys to the next's, and values'. The keys are cut in shares, so that cores without a
   group have work, and put together by what each has of the whole softmax ("Flash-Decoding", Dao et al. 2023). */
int attend(const float *q, const float *k, const float *v, float *y, long groups, long n, long keys, long d, long dv,
           long group, long step, float scale, long shares) {
    long each = ((keys + shares - 1) / shares + BLOCK - 1) / BLOCK * BLOCK, size = n * (dv + 2);
    shares = (keys + each - 1) / each;
    float *parts = malloc(groups * shares * size * sizeof(float));
    if (!parts) return 1;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < groups * shares; t++) {
        long g = t / shares, from = t % shares * each, count = keys - from < each ? keys - from : each;
        float *part = parts + t * size;
        share(q + g * n * d, k + g * group + from * step, v + g * group + from * step, part, part + n * dv,
              part + n * (dv + 1), n, count, d, dv, step, scale);
    }
    for (long g = 0; g < groups; g++)
        for (long i = 0; i < n; i++) {
            float best = -FLT_MAX, sum = 0, *out = y + (g * n + i) * dv, *first = parts + g * shares * size;
            for (long s = 0; s < shares; s++) best = fmaxf(best, first[s * size + n * (dv + 1) + i]);
            memset(out, 0, dv * sizeof(float));
            for (long s = 0; s < shares; s++) {
                const float *part = first + s * size;
                float weight = expf(part[n * (dv + 1) + i] - best);
                sum += weight * part[n * dv + i];
                for (long c = 0; c < dv; c++) out[c] += weight * part[i * dv + c];
            }
            for (long c = 0; c < dv; c++) out[c] /= sum;
        }
    free(parts);
    return 0;
}

/* y = x + o_proj(attention(norm(x))) of each row of x (batch, width), whose key and value are put in `slot` of the
   cache, k and v (batch, groups, slots, d), of which the first `keys` slots are seen. q_norm and k_norm may be NULL. */
int grouped_query(const float *x, const float *norm_w, const float *q_proj, const float *k_proj, const float *v_proj,
                  const float *q_norm, const float *k_norm, const float *o_proj, const float *cosine,
                  const float *sine, float *k, float *v, float *y, long batch, long width, long heads, long groups,
                  long d, long rotary, long slots, long slot, long keys, float eps, float scale, long shares) {
    long q_rows = batch * heads, k_rows = batch * groups, more = packed(batch, width > heads * d ? width : heads * d);
    float *h = malloc((batch * width + 2 * (q_rows + k_rows) * d + more) * sizeof(float));
    if (!h) return 1;
    float *q = h + batch * width, *out = q + q_rows * d, *new_k = out + q_rows * d, *new_v = new_k + k_rows * d;
    float *room = new_v + k_rows * d;
    norm(x, norm_w, h, batch, width, eps);
    linear(q_proj, h, NULL, q, room, batch, heads * d, width);
    linear(k_proj, h, NULL, new_k, room, batch, groups * d, width);
    linear(v_proj, h, NULL, new_v, room, batch, groups * d, width);
    if (q_norm) norm(q, q_norm, q, q_rows, d, eps), norm(new_k, k_norm, new_k, k_rows, d, eps);
    rotate(q, cosine, sine, q_rows, d, rotary, 1), rotate(new_k, cosine, sine, k_rows, d, rotary, 1);
    for (long i = 0; i < k_rows; i++) {
        memcpy(k + (i * slots + slot) * d, new_k + i * d, d * sizeof(float));
        memcpy(v + (i * slots + slot) * d, new_v + i * d, d * sizeof(float));
    }
    int failed = attend(q, k, v, out, k_rows, heads / groups, keys, d, d, slots * d, d, scale, shares);
    linear(o_proj, out, x, y, room, batch, width, heads * d);
    free(h);
    return failed;
}

/* The same for MLA in its absorbed form: [c | k_rope] goes in `slot` of the cache, latent (batch, slots, r + dr).
   q_proj (heads (dn + dr), width), or q_a (q_rank, width), q_norm and q_proj (heads (dn + dr), q_rank); in kv_b are
   each head's W_uk (dn, r) and W_uv (dv, r). */
int multi_head_latent(const float *x, const float *norm_w, const float *q_a, const float *q_norm, const float *q_proj,
                      const float *kv_a, const float *kv_norm, const float *kv_b, const float *o_proj,
                      const float *cosine, const float *sine, float *latent, float *y, long batch, long width,
                      long heads, long q_rank, long dn, long dr, long dv, long r, long slots, long slot, long keys,
                      float eps, float scale, long shares) {
    long wide = r + dr, rows = batch * heads, most = width > heads * dv ? width : heads * dv;
    long more = packed(batch, most > q_rank ? most : q_rank);
    float *h = malloc((batch * (width + q_rank + wide) + rows * (dn + dr + wide + r + dv) + more) * sizeof(float));
    if (!h) return 1;
    float *a = h + batch * width, *own = a + batch * q_rank, *q = own + batch * wide, *mixed = q + rows * (dn + dr);
    float *c = mixed + rows * wide, *out = c + rows * r, *room = out + rows * dv;
    norm(x, norm_w, h, batch, width, eps);
    linear(kv_a, h, NULL, own, room, batch, wide, width);
    for (long b = 0; b < batch; b++, own += wide) {
        norm(own, kv_norm, own, 1, r, eps), rotate(own + r, cosine, sine, 1, dr, dr, 1);
        memcpy(latent + (b * slots + slot) * wide, own, wide * sizeof(float));
    }
    if (q_rank) linear(q_a, h, NULL, a, room, batch, q_rank, width), norm(a, q_norm, a, batch, q_rank, eps);
    linear(q_proj, q_rank ? a : h, NULL, q, room, batch, heads * (dn + dr), q_rank ? q_rank : width);
    rotate(q + dn, cosine, sine, rows, dn + dr, dr, 1);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) { /* [q_nope W_uk | q_rope] */
        const float *w_uk = kv_b + i % heads * (dn + dv) * r, *q_i = q + i * (dn + dr);
        float *m = mixed + i * wide;
        memset(m, 0, r * sizeof(float));
        for (long j = 0; j < dn; j++)
            for (long n = 0; n < r; n++) m[n] += q_i[j] * w_uk[j * r + n];
        memcpy(m + r, q_i + dn, dr * sizeof(float));
    }
    int failed = attend(mixed, latent, latent, c, batch, heads, keys, wide, r, slots * wide, wide, scale, shares);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows * dv; i++) { /* W_uv */
        long row = i / dv;
        out[i] = dot(kv_b + (row % heads * (dn + dv) + dn + i % dv) * r, c + row * r, r);
    }
    linear(o_proj, out, x, y, room, batch, width, heads * dv);
    free(h);
    return failed;
}

/* For training. */

/* the gradients of norm of a row: dx, or with `add` what is added to it, and what is added to dw */
static void norm_row_backward(const float *x, const float *w, const float *dy, float *dx, float *dw, long n, float eps,
                              int add) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps), along = 0;
    for (long i = 0; i < n; i++) along += dy[i] * w[i] * x[i];
    along *= scale * scale / n;
    for (long i = 0; i < n; i++) {
        dx[i] = scale * (dy[i] * w[i] - x[i] * along) + (add ? dx[i] : 0);
        dw[i] += dy[i] * x[i] * scale;
    }
}

/* the gradients of norm: dx, and dw, summed in shares of the rows that do not depend on the number of threads */
int norm_backward(const float *x, const float *w, const float *dy, float *dx, float *dw, long rows, long n, float eps) {
    float *sums = calloc(SHARES * n, sizeof(float));
    if (!sums) return 1;
#pragma omp parallel for schedule(static)
    for (long s = 0; s < SHARES; s++)
        for (long r = rows * s / SHARES; r < rows * (s + 1) / SHARES; r++)
            norm_row_backward(x + r * n, w, dy + r * n, dx + r * n, sums + s * n, n, eps, 0);
    memset(dw, 0, n * sizeof(float));
    for (long i = 0; i < SHARES * n; i++) dw[i % n] += sums[i];
    free(sums);
    return 0;
}

/* of each row of logits (rows, n) the cross-entropy to its target and, in place of the logits, its gradient, softmax
   minus one-hot; 0 where the target is negative */
void cross_entropy(float *logits, const int64_t *targets, float *losses, long rows, long n) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        float *x = logits + r * n;
        losses[r] = 0;
        if (targets[r] < 0) {
            memset(x, 0, n * sizeof(float));
            continue;
        }
        float best = largest(x, n, -INFINITY), own = x[targets[r]];
        vec sums = {0};
        for (long i = 0; i < n; i += LANES) {
            vec e = exponential(part(x + i, n - i, -INFINITY) - best);
            put(x + i, e, n - i), sums += e;
        }
        float sum = total(sums), scale = 1 / sum;
        for (long i = 0; i < n; i++) x[i] *= scale;
        losses[r] = logf(sum) + best - own;
        x[targets[r]] -= 1;
    }
}

/* y (batch, tokens, heads, d) = x, of three steps, turned by RoPE from `lead` on as `rotate` does it, or back for a
   sign of -1. cosine and sine: (tokens, width) for each row of the batch, `angles` apart. */
void rope(const float *x, const float *cosine, const float *sine, float *y, const long *steps, long batch,
          long heads, long tokens, long d, long lead, long width, long angles, float sign) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < batch * tokens; r++) {
        long b = r / tokens, t = r % tokens;
        const float *c = cosine + b * angles + t * width, *s = sine + b * angles + t * width;
        for (long h = 0; h < heads; h++)
            memcpy(y + (r * heads + h) * d, x + b * steps[0] + h * steps[1] + t * steps[2], d * sizeof(float));
        rotate(y + r * heads * d + lead, c, s, heads, d, width, sign);
    }
}

/* y (m, n), or with `add` what is added to it, = a (m, k) b (k, n), n a multiple of COLUMNS */
static void multiply(const float *a, long a_row, long a_step, const float *b, long b_row, float *y, long y_row, long m,
                     long n, long k, int add) {
    for (long r = 0; r < m; r += ROWS)
        for (long c = 0; c < n; c += COLUMNS)
            tile(a + r * a_row, a_row, a_step, m - r, b + c, b_row, k, y + r * y_row + c, y_row, add);
}

/* x (rows, n) -> (n, wide), zeros after the rows */
static void transpose(const float *x, long step, float *y, long rows, long n, long wide) {
    for (long c = 0; c < wide; c += COLUMNS)
        for (long i = 0; i < n; i++)
            for (long u = c; u < c + COLUMNS; u++) y[i * wide + u] = u < rows ? x[u * step + i] : 0;
}

typedef struct { /* (batch, heads, tokens, width), by the steps of the first three */
    float *x;
    long batch, head, token;
} tensor;

static float *at(const tensor *t, long b, long h, long i) { return t->x + b * t->batch + h * t->head + i * t->token; }

/* p (rows, wide) = q keys for the queries from `first` on, `rows` of them; what they do not see gets no weight */
static void scores(const tensor *q, long b, long h, long first, long rows, const float *keys, float *p, long wide,
                   long d) {
    long most = whole_columns(first + rows);
    multiply(at(q, b, h, first), q->token, 1, keys, wide, p, wide, rows, most, d, 0);
    for (long i = 0; i < rows; i++)
        for (long j = first + i + 1; j < most; j++) p[i * wide + j] = -FLT_MAX;
}

/* Causal attention: y = softmax(scale q k^T) v and, for the way back, the logarithms of the softmax's sums (batch,
   heads, tokens). heads / groups query heads share a key head; d and dv are multiples of COLUMNS. */
int causal(const tensor *q, const tensor *k, const tensor *v, const tensor *y, float *logs, long batch, long heads,
           long groups, long tokens, long d, long dv, float scale) {
    long wide = whole_columns(tokens), failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (long own = 0; own < batch * groups; own++) {
        long b = own / groups, g = own % groups, each = heads / groups;
        float *keys = malloc((d + QUERIES) * wide * sizeof(float)), *p = keys + d * wide;
        if (!keys) {
            failed = 1;
            continue;
        }
        transpose(at(k, b, g, 0), k->token, keys, tokens, d, wide);
        for (long h = g * each; h < (g + 1) * each; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long rows = tokens - first < QUERIES ? tokens - first : QUERIES, seen = first + rows;
                scores(q, b, h, first, rows, keys, p, wide, d);
                for (long i = 0; i < rows; i++) {
                    float *row = p + i * wide, best = largest(row, seen, row[0]);
                    vec sums = {0};
                    for (long j = 0; j < seen; j += LANES) {
                        vec e = exponential((load(row + j) - best) * scale);
                        store(row + j, e), sums += e;
                    }
                    float sum = total(sums), weight = 1 / sum;
                    for (long j = 0; j < seen; j++) row[j] *= weight;
                    logs[(b * heads + h) * tokens + first + i] = best * scale + logf(sum);
                }
                multiply(p, wide, 1, at(v, b, g, 0), v->token, at(y, b, h, first), y->token, rows, dv, seen, 0);
            }
        free(keys);
    }
    return failed;
}

/* its gradients, dq, dk and dv (FlashAttention-2, Dao 2023, but for whole rows of scores) */
int causal_backward(const tensor *q, const tensor *k, const tensor *v, const tensor *y, const tensor *dy,
                    const tensor *dq, const tensor *dk, const tensor *dv, const float *logs, long batch, long heads,
                    long groups, long tokens, long d, long v_width, float scale) {
    long wide = whole_columns(tokens), failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (long own = 0; own < batch * groups; own++) {
        long b = own / groups, g = own % groups, each = heads / groups;
        float *keys = malloc((d + v_width + 2 * QUERIES) * wide * sizeof(float)), *values = keys + d * wide;
        float *p = values + v_width * wide, *ds = p + QUERIES * wide;
        if (!keys) {
            failed = 1;
            continue;
        }
        transpose(at(k, b, g, 0), k->token, keys, tokens, d, wide);
        transpose(at(v, b, g, 0), v->token, values, tokens, v_width, wide);
        for (long i = 0; i < tokens; i++) {
            memset(at(dk, b, g, i), 0, d * sizeof(float));
            memset(at(dv, b, g, i), 0, v_width * sizeof(float));
        }
        for (long h = g * each; h < (g + 1) * each; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long rows = tokens - first < QUERIES ? tokens - first : QUERIES, seen = first + rows;
                long most = whole_columns(seen);
                const float *dy_0 = at(dy, b, h, first), *y_0 = at(y, b, h, first);
                scores(q, b, h, first, rows, keys, p, wide, d);
                multiply(dy_0, dy->token, 1, values, wide, ds, wide, rows, most, v_width, 0);
                for (long i = 0; i < rows; i++) {
                    float *row = p + i * wide, *change = ds + i * wide;
                    float log = logs[(b * heads + h) * tokens + first + i];
                    float along = dot(y_0 + i * y->token, dy_0 + i * dy->token, v_width);
                    for (long j = 0; j < most; j += LANES) {
                        vec weight = exponential(load(row + j) * scale - log);
                        store(row + j, weight), store(change + j, weight * (load(change + j) - along) * scale);
                    }
                }
                multiply(p, 1, wide, dy_0, dy->token, at(dv, b, g, 0), dv->token, seen, v_width, rows, 1);
                multiply(ds, 1, wide, at(q, b, h, first), q->token, at(dk, b, g, 0), dk->token, seen, d, rows, 1);
                multiply(ds, wide, 1, at(k, b, g, 0), k->token, at(dq, b, h, first), dq->token, rows, d, seen, 0);
            }
        free(keys);
    }
    return failed;
}

/* Blocks in training as a tape: operators that take and make slots, (batch tokens, width) each, forwards in their order
   and backwards in the other. A thread runs the whole tape over some sequences, then over the next: what an operator
   makes is still in its cache when another takes it, and threads do not wait for each other but at the end; on the way
   back also before and after a block's products for weights, which are over all tokens. Slot 0 is the input, 1 the
   output; of the weights, and their gradients, an operator's begin at `weight`. */
enum { NORM, LINEAR, ROTATE, COPY, SWIGLU, CAUSAL };

typedef struct { /* columns of a slot: of the first head, and how far it is to the next */
    long slot, column, head;
} place;

typedef struct {
    long kind, weight, heads, groups, n, m, other; /* n: columns of x, m: of y or v; m and other: see `run_back` */
    place x, u, v, y;
    float number;
} operation;

typedef void gemm(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                  const int *, const float *, const int *, const float *, float *, const int *);

typedef struct {
    gemm *sgemm;
    const operation *operations;
    const long *widths, *kept, *shared; /* of slots; where they are if all are kept, or give way to others */
    const long *ends;                   /* of the blocks' operations */
    const float *weights, *cosine, *sine;
    long blocks, slots, vectors, tokens, batch, each, threads; /* `each`: sequences at a time */
} job;

static float *begin(float *const *slots, const place *p) { return slots[p->slot] + p->column; }

static tensor as_heads(const job *j, float *const *slots, const place *p) {
    return (tensor){begin(slots, p), j->tokens * j->widths[p->slot], p->head, j->widths[p->slot]};
}

/* y = beta y + a b in Fortran's order, columns first */
static void product(const job *j, const char *how, long m, long n, long k, const float *a, long a_step,
                    const float *b, long b_step, float beta, float *y, long y_step) {
    const int size[] = {m, n, k, a_step, b_step, y_step};
    const float one = 1;
    j->sgemm(how, how + 1, size, size + 1, size + 2, &one, a, size + 3, b, size + 4, &beta, y, size + 5);
}

static int run(const job *j, const operation *o, float *const *slots, long batch) {
    long rows = batch * j->tokens, x_step = j->widths[o->x.slot], y_step = j->widths[o->y.slot];
    const float *w = j->weights + o->weight;
    float *x = begin(slots, &o->x), *u = begin(slots, &o->u), *y = begin(slots, &o->y);
    long u_step = j->widths[o->u.slot];
    switch (o->kind) {
    case NORM:
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < o->heads; h++)
                norm_row(x + r * x_step + h * o->x.head, w, y + r * y_step + h * o->y.head, o->n, o->number);
        return 0;
    case LINEAR: /* y = x W^T, plus u if `other` is 1 */
        if (o->other) memcpy(y, u, rows * o->m * sizeof(float));
        product(j, "TN", o->m, rows, o->n, w, o->n, x, x_step, o->other, y, y_step);
        return 0;
    case ROTATE: /* in place */
        for (long r = 0; r < rows; r++) {
            long angles = r % j->tokens * o->n;
            rotate(x + r * x_step, j->cosine + angles, j->sine + angles, o->heads, o->x.head, o->n, 1);
        }
        return 0;
    case COPY:
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < o->heads; h++)
                memcpy(y + r * y_step + h * o->y.head, x + r * x_step + h * o->x.head, o->n * sizeof(float));
        return 0;
    case SWIGLU:
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < o->n; i += LANES)
                gated(x + r * x_step + i, u + r * u_step + i, NULL, y + r * y_step + i, NULL, o->n - i);
        return 0;
    default: { /* CAUSAL, its logarithms in slot `other` */
        tensor q = as_heads(j, slots, &o->x), k = as_heads(j, slots, &o->u), v = as_heads(j, slots, &o->v);
        tensor out = as_heads(j, slots, &o->y);
        return causal(&q, &k, &v, &out, slots[o->other], batch, o->heads, o->groups, j->tokens, o->n, o->m, o->number);
    }
    }
}

/* `sums`: for each sequence, what it adds to the gradients of the norms' weights */
static int run_back(const job *j, const operation *o, float *const *slots, float *const *grads, float *sums,
                    long batch) {
    long rows = batch * j->tokens, x_step = j->widths[o->x.slot], y_step = j->widths[o->y.slot];
    const float *w = j->weights + o->weight;
    float *x = begin(slots, &o->x), *u = begin(slots, &o->u);
    float *dx = begin(grads, &o->x), *du = begin(grads, &o->u), *dy = begin(grads, &o->y);
    long u_step = j->widths[o->u.slot];
    switch (o->kind) {
    case NORM: /* `other`: whether its x had another use, later on the tape; its sums begin at `m` */
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < o->heads; h++) {
                long at = r * x_step + h * o->x.head;
                norm_row_backward(x + at, w, dy + r * y_step + h * o->y.head, dx + at,
                                  sums + r / j->tokens * j->vectors + o->m, o->n, o->number, o->other);
            }
        return 0;
    case LINEAR:
        if (o->other) memcpy(du, dy, rows * o->m * sizeof(float));
        product(j, "NN", o->n, rows, o->m, w, o->n, dy, y_step, 0, dx, x_step);
        return 0;
    case ROTATE:
        for (long r = 0; r < rows; r++) {
            long angles = r % j->tokens * o->n;
            rotate(dx + r * x_step, j->cosine + angles, j->sine + angles, o->heads, o->x.head, o->n, -1);
        }
        return 0;
    case COPY: /* one head's, or of what all heads share the sum */
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < o->heads; h++) {
                float *to = dx + r * x_step + h * o->x.head, *from = dy + r * y_step + h * o->y.head;
                for (long i = 0; i < o->n; i++) to[i] = from[i] + (h && !o->x.head ? to[i] : 0);
            }
        return 0;
    case SWIGLU:
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < o->n; i += LANES)
                gated(x + r * x_step + i, u + r * u_step + i, dy + r * y_step + i, dx + r * x_step + i,
                      du + r * u_step + i, o->n - i);
        return 0;
    default: {
        tensor q = as_heads(j, slots, &o->x), k = as_heads(j, slots, &o->u), v = as_heads(j, slots, &o->v);
        tensor y = as_heads(j, slots, &o->y), dout = as_heads(j, grads, &o->y), dq = as_heads(j, grads, &o->x);
        tensor dk = as_heads(j, grads, &o->u), dv = as_heads(j, grads, &o->v);
        return causal_backward(&q, &k, &v, &y, &dout, &dq, &dk, &dv, slots[o->other], batch, o->heads, o->groups,
                               j->tokens, o->n, o->m, o->number);
    }
    }
}

/* where the sequence b is in all slots: the ends of the tape in x and y, the others in `memory` */
static void place_slots(const job *j, float **slots, float *x, float *y, float *memory, const long *at, long b) {
    slots[0] = x, slots[1] = y;
    for (long s = 2; s < j->slots; s++) slots[s] = memory + j->batch * j->tokens * at[s];
    for (long s = 0; s < j->slots; s++) slots[s] += b * j->tokens * j->widths[s];
}

static long sequences(const job *j, long b) { return j->batch - b < j->each ? j->batch - b : j->each; }

/* y = the tape of x (batch, tokens, width), with slots in `memory`, all of them to `keep` for the way back */
int tape_forward(const job *j, float *x, float *y, float *memory, long keep) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(j->threads) reduction(| : failed)
    for (long b = 0; b < j->batch; b += j->each) {
        float *slots[j->slots];
        place_slots(j, slots, x, y, memory, keep ? j->kept : j->shared, b);
        for (long i = 0; i < j->ends[j->blocks - 1]; i++) failed |= run(j, j->operations + i, slots, sequences(j, b));
    }
    return failed;
}

/* its gradients, dx and those of the weights; slots are as kept, and sums (batch, vectors) begin as zeros */
int tape_backward(const job *j, float *x, float *kept, float *dy, float *dx, float *memory, float *weight_grads,
                  float *sums) {
    int failed = 0;
#pragma omp parallel num_threads(j->threads) reduction(| : failed)
    for (long block = j->blocks; block--;) {
        long first = block ? j->ends[block - 1] : 0, last = j->ends[block];
        float *slots[j->slots], *grads[j->slots];
#pragma omp for schedule(static)
        for (long b = 0; b < j->batch; b += j->each) {
            place_slots(j, slots, x, x, kept, j->kept, b); /* the output itself is not wanted */
            place_slots(j, grads, dx, dy, memory, j->shared, b);
            for (long i = last; i-- > first;)
                failed |= run_back(j, j->operations + i, slots, grads, sums + b * j->vectors, sequences(j, b));
        }
        place_slots(j, slots, x, x, kept, j->kept, 0), place_slots(j, grads, dx, dy, memory, j->shared, 0);
        for (const operation *o = j->operations + first; o < j->operations + last; o++) {
            float *in = begin(slots, &o->x), *out = begin(grads, &o->y), *to = weight_grads + o->weight;
            if (o->kind == NORM)
#pragma omp for schedule(static) nowait
                for (long c = 0; c < o->n; c++) {
                    float sum = 0;
                    for (long b = 0; b < j->batch; b++) sum += sums[b * j->vectors + o->m + c];
                    to[c] = sum;
                }
            long share = o->kind == LINEAR ? ((o->m - 1) / j->threads / COLUMNS + 1) * COLUMNS : 1;
            if (o->kind == LINEAR)
#pragma omp for schedule(static) nowait
                for (long c = 0; c < o->m; c += share)
                    product(j, "NT", o->n, o->m - c < share ? o->m - c : share, j->batch * j->tokens, in,
                            j->widths[o->x.slot], out + c, j->widths[o->y.slot], 0, to + c * o->n, o->n);
        }
#pragma omp barrier
    }
    return failed;
}
