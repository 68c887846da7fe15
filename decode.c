/* What a layer computes of the next token of each row on a CPU, in fp32: model.py's attentions and MLP, by all cores.

   native.py compiles and calls it. A step at batch 1 reads every weight for one multiplication each, so it is bound
   by reading; through torch, whose operators each cost as much as what they compute here, by their number. At larger
   batches a BLAS would first copy every matrix into the order it likes, which costs as much as multiplying.

   Matrices are row-major; `step` is from one row to the next. The work is cut the same way at a given number of
   threads, so results repeat to the last bit. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, BLOCK = 32, ROWS = 6, COLUMNS = 16 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

static vec load(const float *x) { return *(const vec *)x; }
static void store(float *x, vec a) { *(vec *)x = a; }

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
    ivec in_range = x > -87;
    x = (vec)((ivec)x & in_range) * 1.44269504f;
    ivec whole = __builtin_convertvector(x - 0.5f, ivec);
    vec r = (x - __builtin_convertvector(whole, vec)) * 0.693147181f;
    vec p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return (vec)((ivec)(p * (vec)((whole + 127) << 23)) & in_range);
}

/* g = silu(g) * u, silu(g) = g / (1 + e^-g), by e^-|g| so that nothing overflows */
static void silu_times(float *g, const float *u, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec x = load(g + i), one = {1, 1, 1, 1, 1, 1, 1, 1};
        ivec negative = x < 0;
        vec e = exponential((vec)((ivec)x | INT_MIN)); /* the sign bit: of -|x| */
        vec numerator = (vec)(((ivec)e & negative) | ((ivec)one & ~negative));
        x *= load(u + i) * numerator / (1 + e);
        store(g + i, x);
    }
    for (; i < n; i++) g[i] *= u[i] / (1 + expf(-g[i]));
}

/* y = x / rms(x) * w of each row */
void norm(const float *x, const float *w, float *y, long rows, long n, float eps) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 15)
    for (long r = 0; r < rows; r++) {
        float scale = 1 / sqrtf(dot(x + r * n, x + r * n, n) / n + eps);
        for (long i = 0; i < n; i++) y[r * n + i] = x[r * n + i] * scale * w[i];
    }
}

/* the first `width` numbers of each row of x (rows, n) turned by RoPE, as model.rotate does */
static void rotate(float *x, const float *cosine, const float *sine, long rows, long n, long width) {
    for (long half = width / 2; rows--; x += n)
        for (long i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] + b * sine[i];
            x[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
}

/* y[r][c] = w_r . x_c for ROWS rows of w, from the first on at most the `last` one, and COLUMNS rows of x, x as
   (n, COLUMNS): each number of w multiplies a vector, so that nothing need be summed across vectors */
static void tile(const float *w, long last, const float *x, float y[ROWS][COLUMNS], long n) {
    const float *of[ROWS];
    for (int r = 0; r < ROWS; r++) of[r] = w + (r < last ? r : last) * n;
    vec sum[ROWS][2] = {{{0}}};
    for (long i = 0; i < n; i++, x += COLUMNS) {
        __builtin_prefetch(w + ROWS * (n + i)); /* of the next rows */
        vec a = load(x), b = load(x + LANES);
        for (int r = 0; r < ROWS; r++) sum[r][0] += a * of[r][i], sum[r][1] += b * of[r][i];
    }
    memcpy(y, sum, sizeof sum);
}

/* how many numbers x (batch, n) has in the order in which `linear` multiplies it */
long packed(long batch, long n) { return (batch + COLUMNS - 1) / COLUMNS * COLUMNS * n; }

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
                tile(w + r * n, rows - 1 - r, room + c * n, sums, n);
                for (long b = c; b < batch && b < c + COLUMNS; b++)
                    for (long i = r; i < rows && i < r + ROWS; i++)
                        y[b * rows + i] = (plus ? plus[b * rows + i] : 0) + sums[i - r][b - c];
            }
    }
}

/* y = x + down (silu(gate h) * up h), h = norm(x), of each row of x (batch, n). This and what follows returns 1
   if there is no memory, else 0. */
int mlp(const float *x, const float *norm_w, const float *gate, const float *up, const float *down, float *y,
        long batch, long n, long inner, float eps) {
    long more = packed(batch, n > inner ? n : inner);
    float *h = malloc((batch * (n + 2 * inner) + more) * sizeof(float));
    if (!h) return 1;
    float *g = h + batch * n, *u = g + batch * inner, *room = u + batch * inner;
    norm(x, norm_w, h, batch, n, eps);
    linear(gate, h, NULL, g, room, batch, inner, n);
    linear(up, h, NULL, u, room, batch, inner, n);
#pragma omp parallel for schedule(static) if (batch > 1)
    for (long b = 0; b < batch; b++) silu_times(g + b * inner, u + b * inner, inner);
    linear(down, g, x, y, room, batch, n, inner);
    free(h);
    return 0;
}

/* of a block of scores and one more */
static float largest(const float *scores, float best) {
    float of[LANES];
    memcpy(of, scores, sizeof of);
    for (int j = LANES; j < BLOCK; j += LANES)
        for (int i = 0; i < LANES; i++) of[i] = scores[j + i] > of[i] ? scores[j + i] : of[i];
    for (int i = 0; i < LANES; i++) best = of[i] > best ? of[i] : best;
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
            float best = largest(p[i], top[i]);
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

/* y = x + o_proj(attention(norm(x))) of each row of x (batch, width), whose key and value are put in `slot` of the cache,
   k and v (batch, groups, slots, d), of which the first `keys` slots are seen. q_norm and k_norm may be NULL. */
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
    rotate(q, cosine, sine, q_rows, d, rotary), rotate(new_k, cosine, sine, k_rows, d, rotary);
    for (long i = 0; i < k_rows; i++) {
        memcpy(k + (i * slots + slot) * d, new_k + i * d, d * sizeof(float));
        memcpy(v + (i * slots + slot) * d, new_v + i * d, d * sizeof(float));
    }
    int failed = attend(q, k, v, out, k_rows, heads / groups, keys, d, d, slots * d, d, scale, shares);
    linear(o_proj, out, x, y, room, batch, width, heads * d);
    free(h);
    return failed;
}

/* The same for MLA in its absorbed form: a row's [c | k_rope] goes in `slot` of the cache, latent (batch, slots, r + dr).
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
        norm(own, kv_norm, own, 1, r, eps), rotate(own + r, cosine, sine, 1, dr, dr);
        memcpy(latent + (b * slots + slot) * wide, own, wide * sizeof(float));
    }
    if (q_rank) linear(q_a, h, NULL, a, room, batch, q_rank, width), norm(a, q_norm, a, batch, q_rank, eps);
    linear(q_proj, q_rank ? a : h, NULL, q, room, batch, heads * (dn + dr), q_rank ? q_rank : width);
    rotate(q + dn, cosine, sine, rows, dn + dr, dr);
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
