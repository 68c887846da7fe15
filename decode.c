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

enum { LANES = 8, BLOCK = 32 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES)));

static vec load(const float *x) { return *(const vec *)x; }

static float total(vec a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

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

/* p[j] = scale * a . k_j and o[j] = scale * b . k_j for four rows k_j: each is loaded once for both */
static void dot2x4(const float *a, const float *b, const float *k, long step, long n, float scale, float *p, float *o) {
    const vec none = {0};
    vec x[4] = {none, none, none, none}, y[4] = {none, none, none, none};
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec u = load(a + i), v = load(b + i);
        for (int j = 0; j < 4; j++) {
            vec w = load(k + j * step + i);
            x[j] += u * w, y[j] += v * w;
        }
    }
    float s[4], t[4];
    for (int j = 0; j < 4; j++) s[j] = total(x[j]), t[j] = total(y[j]);
    for (; i < n; i++)
        for (int j = 0; j < 4; j++) s[j] += a[i] * k[j * step + i], t[j] += b[i] * k[j * step + i];
    for (int j = 0; j < 4; j++) p[j] = scale * s[j], o[j] = scale * t[j];
}

/* y = keep * y + p v and z = kept * z + o v for `rows` rows of v, 32 columns: each is loaded once for both */
static void mix2(const float *p, const float *o, const float *v, long step, long rows, float keep, float kept, float *y,
                 float *z) {
    vec s[4], t[4];
    for (int u = 0; u < 4; u++) s[u] = load(y + u * LANES) * keep, t[u] = load(z + u * LANES) * kept;
    for (long j = 0; j < rows; j++)
        for (int u = 0; u < 4; u++) {
            vec x = load(v + j * step + u * LANES);
            s[u] += p[j] * x, t[u] += o[j] * x;
        }
    memcpy(y, s, sizeof s), memcpy(z, t, sizeof t);
}

/* e^x for x <= 0, to 2e-7: 2^whole by its bits, the rest by its series; 0 below -87 */
static vec exponential(vec x) {
    ivec in_range = x > -87;
    x = (vec)((ivec)x & in_range) * 1.44269504f;
    ivec whole = __builtin_convertvector(x - 0.5f, ivec);
    vec r = (x - __builtin_convertvector(whole, vec)) * 0.693147181f;
    vec p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
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
        memcpy(g + i, &x, sizeof x);
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

/* y = x W^T, or plus + x W^T: x (batch, n), w (rows, n), y and plus (batch, rows) */
void linear(const float *w, const float *x, const float *plus, float *y, long batch, long rows, long n) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r += 4) {
        long last = r + 4 < rows ? r + 4 : rows;
        if (batch > 1 && r + 4 == last)
            for (long b = 0; b < batch; b += 2) {
                long c = b + 1 < batch ? b + 1 : b;
                dot2x4(x + b * n, x + c * n, w + r * n, n, n, 1, y + b * rows + r, y + c * rows + r);
                for (long i = 4 * n * b / batch; i < 4 * n * (b + 2) / batch; i += 16) /* of the next four rows */
                    __builtin_prefetch(w + last * n + i);
            }
        else
            for (long b = 0; b < batch; b++)
                for (long i = r; i < last; i++) y[b * rows + i] = dot(w + i * n, x + b * n, n);
        for (long b = 0; plus && b < batch; b++)
            for (long i = r; i < last; i++) y[b * rows + i] += plus[b * rows + i];
    }
}

/* y = x + down (silu(gate h) * up h), h = norm(x), of each row of x (batch, n). This and what follows returns 1 if there
   is no memory, else 0. */
int mlp(const float *x, const float *norm_w, const float *gate, const float *up, const float *down, float *y,
        long batch, long n, long inner, float eps) {
    float *h = malloc(batch * (n + 2 * inner) * sizeof(float)), *g = h + batch * n, *u = g + batch * inner;
    if (!h) return 1;
    norm(x, norm_w, h, batch, n, eps);
    linear(gate, h, NULL, g, batch, inner, n);
    linear(up, h, NULL, u, batch, inner, n);
#pragma omp parallel for schedule(static) if (batch > 1)
    for (long b = 0; b < batch; b++) silu_times(g + b * inner, u + b * inner, inner);
    linear(down, g, x, y, batch, n, inner);
    free(h);
    return 0;
}

/* Of a softmax over some keys: sum_j e^(score_j - top) v_j (n, dv), and sum_j e^(score_j - top) and top (n), for n
   queries q (n, d), in pairs, the last one perhaps with itself. A block of keys and values is read once, for all of
   them ("online softmax", Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). */
static void share(const float *q, const float *k, const float *v, float *y, float *sum, float *top, long n, long keys,
                  long d, long dv, long step, float scale) {
    float p[n][BLOCK], keep[n];
    memset(y, 0, n * dv * sizeof(float));
    for (long i = 0; i < n; i++) sum[i] = 0, top[i] = -FLT_MAX;
    for (long at = 0; at < keys; at += BLOCK, k += BLOCK * step, v += BLOCK * step) {
        long rows = keys - at < BLOCK ? keys - at : BLOCK, c = 0;
        for (long j = 0; j < BLOCK; j += 4) /* four keys, then 32 columns of the values, stay in the L1 cache */
            for (long i = 0; i < n; i += 2)
                if (j + 4 <= rows && i + 1 < n)
                    dot2x4(q + i * d, q + (i + 1) * d, k + j * step, step, d, scale, &p[i][j], &p[i + 1][j]);
                else
                    for (long o = i; o < n && o < i + 2; o++)
                        for (long u = j; u < j + 4; u++)
                            p[o][u] = u < rows ? scale * dot(q + o * d, k + u * step, d) : -FLT_MAX;
        for (long i = 0; i < n; i++) {
            float best = top[i];
            for (long j = 0; j < BLOCK; j++) best = p[i][j] > best ? p[i][j] : best;
            vec added = {0};
            for (long j = 0; j < BLOCK; j += LANES) {
                vec e = exponential(load(&p[i][j]) - best);
                memcpy(&p[i][j], &e, sizeof e);
                added += e;
            }
            keep[i] = expf(top[i] - best), top[i] = best;
            sum[i] = sum[i] * keep[i] + total(added);
        }
        for (; c + 4 * LANES <= dv; c += 4 * LANES)
            for (long i = 0; i < n; i += 2) {
                long o = i + 1 < n ? i + 1 : i;
                mix2(p[i], p[o], v + c, step, rows, keep[i], keep[o], y + i * dv + c, y + o * dv + c);
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
    long q_rows = batch * heads, k_rows = batch * groups;
    float *h = malloc((batch * width + 2 * (q_rows + k_rows) * d) * sizeof(float));
    if (!h) return 1;
    float *q = h + batch * width, *out = q + q_rows * d, *new_k = out + q_rows * d, *new_v = new_k + k_rows * d;
    norm(x, norm_w, h, batch, width, eps);
    linear(q_proj, h, NULL, q, batch, heads * d, width);
    linear(k_proj, h, NULL, new_k, batch, groups * d, width);
    linear(v_proj, h, NULL, new_v, batch, groups * d, width);
    if (q_norm) norm(q, q_norm, q, q_rows, d, eps), norm(new_k, k_norm, new_k, k_rows, d, eps);
    rotate(q, cosine, sine, q_rows, d, rotary), rotate(new_k, cosine, sine, k_rows, d, rotary);
    for (long i = 0; i < k_rows; i++) {
        memcpy(k + (i * slots + slot) * d, new_k + i * d, d * sizeof(float));
        memcpy(v + (i * slots + slot) * d, new_v + i * d, d * sizeof(float));
    }
    int failed = attend(q, k, v, out, k_rows, heads / groups, keys, d, d, slots * d, d, scale, shares);
    linear(o_proj, out, x, y, batch, width, heads * d);
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
    long wide = r + dr, rows = batch * heads;
    float *h = malloc((batch * (width + q_rank + wide) + rows * (dn + dr + wide + r + dv)) * sizeof(float));
    if (!h) return 1;
    float *a = h + batch * width, *own = a + batch * q_rank, *q = own + batch * wide, *mixed = q + rows * (dn + dr);
    float *c = mixed + rows * wide, *out = c + rows * r;
    norm(x, norm_w, h, batch, width, eps);
    linear(kv_a, h, NULL, own, batch, wide, width);
    for (long b = 0; b < batch; b++, own += wide) {
        norm(own, kv_norm, own, 1, r, eps), rotate(own + r, cosine, sine, 1, dr, dr);
        memcpy(latent + (b * slots + slot) * wide, own, wide * sizeof(float));
    }
    if (q_rank) linear(q_a, h, NULL, a, batch, q_rank, width), norm(a, q_norm, a, batch, q_rank, eps);
    linear(q_proj, q_rank ? a : h, NULL, q, batch, heads * (dn + dr), q_rank ? q_rank : width);
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
    linear(o_proj, out, x, y, batch, width, heads * dv);
    free(h);
    return failed;
}
