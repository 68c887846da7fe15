/* One decoding step of a whole model in one call: the next token of each row in, final hidden states out. Weights are
   fp32 or bf16, the cache has any of its formats; what is computed is fp32.

   It computes GPT.hidden of model.py for one token a row over a KVCache: embedding, blocks (grouped-query attention, or
   MLA in its absorbed form; SwiGLU), final norm. cpu_decode.py fills in the structs and calls it. At batch 1 reading
   the weights bounds a step; through torch it is bound by the number of operators instead.

   One parallel region is the whole step. Every thread runs the loop over the layers, and the loops marked `omp for`
   divide their iterations among the threads, which wait for each other at their end unless it says `nowait`. Work is
   divided in the same way at each call with the same number of threads, so results repeat bit for bit.

   Shapes: B batch, C width, H query heads, G key heads, D head width, r latent width, dn dr dv as in model.py. */
#pragma GCC optimize "no-associative-math" /* a b + c d + e would be three operations in place of two */
#include "cpu_attention.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* Fewest keys that are worth a share of their own, and what divides their number; columns of W_uk, and numbers of a row
   of bf16 weights, that are taken at once. */
enum { MIN_SHARE = 64, KEYS = 32, SLICE = 32, CHUNK = 256 };

typedef struct {
    const char *weight;
    float eps;
} norm;

typedef struct { /* model.CausalConv */
    const char *weight; /* (taps, n) */
    part past;          /* (B, slots, n) a ring: the vector at position p is in slot p % slots */
    long taps, slots;
} conv;

typedef struct { /* one block; what its attention does not have is NULL */
    norm attention_norm, mlp_norm, q_norm, k_norm, q_a_norm, kv_a_norm;
    conv k_conv, v_conv; /* k_conv: for MLA, of the latent and the rope key */
    const char *q_a, *q, *k, *v, *kv_a, *kv_b, *o; /* q: q_proj, or q_b_proj after q_a */
    const char *gate, *up, *down;
    part keys, values; /* its cache: (B, G, slots, D) each; for MLA both are [c | k_rope] (B, slots, r + dr) */
    part key_factor;   /* (B, H, slots) what MLA's qk_norm caches: 1 / rms of each head's key */
    long inner, slots, window, sinks;
} layer;

typedef struct {
    const char *embedding; /* (V, C) */
    norm final_norm;
    const layer *layers;
    const float *frequency; /* (rope / 2) RoPE's, in radians a token */
    int64_t *lengths;       /* (B) tokens that the cache holds of each row */
    float *scratch;         /* decode_scratch(m) numbers */
    long n_layer, batch, width, vocab, heads, groups, max_len, endless;
    long head, rope, dv;     /* width of a head's query; how much of it RoPE rotates; width of its result */
    long rank, q_rank, nope; /* of MLA only: r, width of the query's latent or 0, dn */
    long threads;
    long weights;             /* their format, FP32 or BF16 */
    float scale, rope_factor; /* of scores; of cosines and sines */
} model;

/* Intermediate results, in m->scratch. "packed": what matrix products read at B > 1, see `pack`. */
typedef struct {
    float *x, *q, *k, *v, *q_latent, *mixed, *context, *out, *cosine, *sine, *rms, *packed, *inner, *parts;
    float *own; /* of each thread, `own_size` apart: a normalized row, then a group's queries and room for attention */
    float *fp32; /* of each thread, `fp32_size` apart: small weights in fp32, see `in_fp32` */
    long own_size, fp32_size, size; /* numbers; of all of them */
} buffers;

static float *own_of_thread(const buffers *s) { return s->own + omp_get_thread_num() * s->own_size; }
static float *fp32_of_thread(const buffers *s) { return s->fp32 + omp_get_thread_num() * s->fp32_size; }

/* n weights in fp32, valid until the thread's next call. */
static const float *in_fp32(const model *m, const buffers *s, const char *w, long n) {
    if (m->weights == FP32 || !w) return (const float *)w;
    widen(BF16, w, fp32_of_thread(s), n);
    return fp32_of_thread(s);
}

/* Where number i of the weights w is. */
static const char *at(const model *m, const char *w, long i) { return w + bytes_of(m->weights, i); }

/* Widths of the keys and values that attention reads: a head's, or for MLA the latent's. */
static long key_width(const model *m) { return m->rank ? m->rank + m->rope : m->head; }
static long value_width(const model *m) { return m->rank ? m->rank : m->head; }
static long widest_input(const model *m) { return max(m->width, max(m->q_rank, m->heads * m->dv)); }

/* The next n numbers of the scratch memory; they begin a cache line. */
static float *take(const model *m, buffers *s, long n) {
    float *begin = m->scratch ? m->scratch + s->size : NULL;
    s->size += whole_columns(n);
    return begin;
}

static buffers divide_scratch(const model *m) {
    buffers s = {0};
    long B = m->batch, H = m->heads, kv = m->rank ? m->rank + m->rope : m->groups * m->head, inner = 0;
    long queries = H / m->groups, d = key_width(m), dv = value_width(m);
    for (long i = 0; i < m->n_layer; i++) inner = max(inner, m->layers[i].inner);
    s.x = take(m, &s, B * m->width), s.q = take(m, &s, B * H * m->head), s.k = take(m, &s, B * kv);
    s.v = take(m, &s, B * kv), s.q_latent = take(m, &s, B * m->q_rank), s.mixed = take(m, &s, m->rank ? B * H * d : 0);
    s.context = take(m, &s, m->rank ? B * H * dv : 0), s.out = take(m, &s, B * H * m->dv);
    s.cosine = take(m, &s, B * m->rope / 2), s.sine = take(m, &s, B * m->rope / 2), s.rms = take(m, &s, B);
    s.packed = take(m, &s, whole_columns(B) * widest_input(m)), s.inner = take(m, &s, whole_columns(B) * inner);
    s.parts = take(m, &s, m->threads > 1 ? B * m->groups * m->threads * queries * (dv + 2) : 0);
    long room = whole_columns(queries * (d + 2)) + divide_room(NULL, queries, d, dv).size;
    s.own_size = whole_columns(max(widest_input(m), room));
    s.own = take(m, &s, s.own_size * m->threads);
    s.fp32_size = whole_columns(max(widest_input(m), max(kv, m->head))) * 3; /* `convolve` uses three parts */
    s.fp32 = take(m, &s, s.fp32_size * m->threads);
    return s;
}

/* How many numbers a step of m needs as scratch memory. */
long decode_scratch(const model *m) { return divide_scratch(m).size; }

/* x (B, n), times the weight and each row's 1 / rms if there is a weight, as `project` reads it: (B / COLUMNS, n,
   COLUMNS), so that one number of all 16 rows makes two vectors. The last row fills the columns left. */
static void pack(const float *x, const float *rms, const float *weight, float *y, long batch, long n) {
#pragma omp for schedule(static)
    for (long i = 0; i < n; i++)
        for (long c = 0; c < batch; c += COLUMNS)
            for (long u = 0; u < COLUMNS; u++) {
                long b = min(c + u, batch - 1);
                y[c * n + i * COLUMNS + u] = x[b * n + i] * (weight ? rms[b] * weight[i] : 1);
            }
}

/* RMSNorm of each row of x (B, n), as `project` reads it. One row each thread norms for itself: none has to wait. */
static const float *normalize(const model *m, const buffers *s, const float *x, const norm *w, long n) {
    if (m->batch == 1) {
        float *y = own_of_thread(s);
        norm_row(x, in_fp32(m, s, w->weight, n), y, n, w->eps);
        return y;
    }
#pragma omp for schedule(static)
    for (long b = 0; b < m->batch; b++) s->rms[b] = 1 / sqrtf(dot(x + b * n, x + b * n, n) / n + w->eps);
    pack(x, s->rms, in_fp32(m, s, w->weight, n), s->packed, m->batch, n);
    return s->packed;
}

/* A tile of W x^T: w the first of `rows` rows of weights, n numbers each; x packed; y (ROWS, COLUMNS). */
static void weight_tile(enum format f, const char *w, long rows, const float *x, long n, float *y) {
    float part[ROWS * CHUNK];
    if (f == FP32) tile((const float *)w, n, 1, rows, x, COLUMNS, n, y, COLUMNS, 0, 1);
    for (long i = 0; f == BF16 && i < n; i += CHUNK) {
        for (long r = 0; r < min(rows, ROWS); r++) {
            const char *row = w + 2 * (r * n + i), *ahead = row + 2 * ROWS * n;
            for (long line = 0; line < 2 * CHUNK; line += 64) __builtin_prefetch(ahead + line);
            widen(BF16, row, part + r * CHUNK, min(n - i, CHUNK));
        }
        tile(part, CHUNK, 1, rows, x + i * COLUMNS, COLUMNS, min(n - i, CHUNK), y, COLUMNS, i > 0, 0);
    }
}

/* y = x W^T, or plus + x W^T: x (B, n), packed if B > 1; w (rows, n); y and plus (B, rows). Threads do not wait at its
   end: the caller puts a barrier behind the last of several products. */
static void project(enum format f, long batch, const char *w, const float *x, const float *plus, float *y, long rows,
                    long n) {
    if (batch == 1) {
#pragma omp for schedule(static) nowait
        for (long r = 0; r < rows; r++) y[r] = (plus ? plus[r] : 0) + weight_dot(f, w + bytes_of(f, r * n), x, n);
        return;
    }
#pragma omp for schedule(static) nowait
    for (long r = 0; r < rows; r += ROWS)
        for (long c = 0; c < batch; c += COLUMNS) {
            float sums[ROWS][COLUMNS];
            weight_tile(f, w + bytes_of(f, r * n), rows - r, x + c * n, n, sums[0]);
            for (long b = c; b < batch && b < c + COLUMNS; b++)
                for (long i = r; i < rows && i < r + ROWS; i++)
                    y[b * rows + i] = (plus ? plus[b * rows + i] : 0) + sums[i - r][b - c];
        }
}

/* y = silu(gate x) * up x, packed as x is: a tile of a product has that order already. */
static void gate_up(enum format f, const layer *l, const float *x, float *y, long batch, long n) {
    if (batch == 1) {
#pragma omp for schedule(static)
        for (long r = 0; r < l->inner; r += LANES) {
            float g[LANES] = {0}, u[LANES] = {0};
            for (long i = 0; i < LANES && r + i < l->inner; i++) {
                long row = bytes_of(f, (r + i) * n);
                g[i] = weight_dot(f, l->gate + row, x, n), u[i] = weight_dot(f, l->up + row, x, n);
            }
            gated(g, u, NULL, y + r, NULL, l->inner - r);
        }
        return;
    }
#pragma omp for schedule(static)
    for (long r = 0; r < l->inner; r += ROWS)
        for (long c = 0; c < batch; c += COLUMNS) {
            float g[ROWS][COLUMNS], u[ROWS][COLUMNS], *out = y + c * l->inner + r * COLUMNS;
            weight_tile(f, l->gate + bytes_of(f, r * n), l->inner - r, x + c * n, n, g[0]);
            weight_tile(f, l->up + bytes_of(f, r * n), l->inner - r, x + c * n, n, u[0]);
            for (long i = 0; i < ROWS * COLUMNS && r * COLUMNS + i < l->inner * COLUMNS; i += LANES)
                gated(g[0] + i, u[0] + i, NULL, out + i, NULL, LANES);
        }
}

/* x += down_proj(silu(gate_proj h) * up_proj h), h = norm(x). */
static void mlp(const model *m, const layer *l, const buffers *s) {
    gate_up(m->weights, l, normalize(m, s, s->x, &l->mlp_norm, m->width), s->inner, m->batch, m->width);
    project(m->weights, m->batch, l->down, s->inner, s->x, s->x, m->width, l->inner);
#pragma omp barrier
}

/* In how many shares to cut the keys of each key head, so that no thread is idle for long: the smallest number from
   which no other takes a tenth off the work of the busiest thread. */
static long count_shares(const model *m, const layer *l) {
    long groups = m->batch * m->groups, threads = m->threads, keys = 0, best = 1;
    for (long b = 0; b < m->batch; b++) keys = max(keys, min(m->lengths[b] + 1, l->slots));
    for (long n = 2; n <= threads && n * MIN_SHARE <= keys; n++) {
        long most = (groups * n + threads - 1) / threads, now = (groups * best + threads - 1) / threads;
        if (10 * most * best < 9 * now * n) best = n;
    }
    return best;
}

/* The slot of the token at position p. The slots behind the sinks are a ring. */
static long slot_of(const layer *l, long p) {
    long ring = max(l->slots - l->sinks, 1);
    return p < l->sinks ? p : p - (p - l->sinks) / ring * ring;
}

/* The first of the keys in a share of row b, and how many there are: none if it has few keys. */
static long first_key(const model *m, const layer *l, long b, long share, long shares, long *count) {
    long keys = min(m->lengths[b] + 1, l->slots), each = ((keys + shares - 1) / shares + KEYS - 1) / KEYS * KEYS;
    *count = min(max(keys - share * each, 0), each);
    return share * each;
}

/* Attention of the queries q (H / G, d) of group g in row b to one share of its keys, into y (B, H, dv) if it is the
   only share, else into parts, for `combine`. */
static void attend(const model *m, const layer *l, const buffers *s, const float *q, float *y, long b, long g,
                   long share, long shares) {
    long n = m->heads / m->groups, d = key_width(m), dv = value_width(m), group = b * m->groups + g, count;
    long first = first_key(m, l, b, share, shares, &count);
    float *sum = own_of_thread(s) + n * d, *top = sum + n, *room = own_of_thread(s) + whole_columns(n * (d + 2));
    float *part = s->parts + (group * shares + share) * n * (dv + 2), *out = y + group * n * dv;
    if (shares > 1) out = part, sum = part + n * dv, top = sum + n;
    share_of_softmax(q, &l->keys, &l->values, group * l->slots + first, l->key_factor.codes ? &l->key_factor : NULL,
                     (b * m->heads + g * n) * l->slots + first, l->slots, out, sum, top, room, n, count, dv, m->scale);
    if (shares == 1)
        for (long i = 0; i < n * dv; i++) out[i] /= sum[i / dv];
}

/* y (B, H, dv) from the shares of each softmax ("Flash-Decoding", Dao et al. 2023). */
static void combine(const model *m, const buffers *s, float *y, long shares) {
    long n = m->heads / m->groups, dv = value_width(m), size = n * (dv + 2);
#pragma omp for schedule(static)
    for (long row = 0; row < m->batch * m->heads; row++) {
        const float *parts = s->parts + row / n * shares * size, *sums = parts + n * dv + row % n, *tops = sums + n;
        float best = -FLT_MAX, sum = 0, *out = y + row * dv;
        for (long i = 0; i < shares; i++) best = fmaxf(best, tops[i * size]);
        memset(out, 0, dv * sizeof(float));
        for (long i = 0; i < shares; i++) {
            const float *part = parts + i * size + row % n * dv, weight = expf(tops[i * size] - best);
            sum += weight * sums[i * size];
            for (long c = 0; c < dv; c++) out[c] += weight * part[c];
        }
        for (long c = 0; c < dv; c++) out[c] /= sum;
    }
}

/* x += o_proj(out) */
static void project_out(const model *m, const layer *l, const buffers *s) {
    long n = m->heads * m->dv;
    if (m->batch > 1) pack(s->out, NULL, NULL, s->packed, m->batch, n);
    project(m->weights, m->batch, l->o, m->batch > 1 ? s->packed : s->out, s->x, s->x, m->width, n);
#pragma omp barrier
}

/* RoPE of one head at the position of row b, in place, as model.rotate does it. */
static void rotate(const model *m, const buffers *s, float *x, long b) {
    long half = m->rope / 2;
    const float *cosine = s->cosine + b * half, *sine = s->sine + b * half;
    for (long i = 0; i < half; i++) {
        float x1 = x[i], x2 = x[i + half];
        x[i] = x1 * cosine[i] - x2 * sine[i], x[i + half] = x2 * cosine[i] + x1 * sine[i];
    }
}

/* x (n) of row b plus what the convolution takes from the vectors before it; x itself goes to the ring. */
static void convolve(const model *m, const buffers *s, const conv *w, float *x, long b, long n) {
    long p = m->lengths[b], first = b * w->slots;
    float *old = fp32_of_thread(s) + s->fp32_size / 3, *sum = old + s->fp32_size / 3;
    memcpy(sum, x, n * sizeof(float));
    for (long i = 1; i <= min(w->taps, p); i++) {
        const float *weight = in_fp32(m, s, at(m, w->weight, (i - 1) * n), n);
        widen(w->past.format, w->past.codes + bytes_of(w->past.format, (first + (p - i) % w->slots) * n), old, n);
        for (long c = 0; c < n; c++) sum[c] += weight[c] * old[c];
    }
    store_row(&w->past, first + p % w->slots, x);
    memcpy(x, sum, n * sizeof(float));
}

/* The heads at x of row b: qk_norm if the layer has one, then RoPE. */
static void norm_and_rotate(const model *m, const buffers *s, const norm *w, float *x, long b, long heads) {
    for (; heads--; x += m->head) {
        if (w->weight) norm_row(x, in_fp32(m, s, w->weight, m->head), x, m->head, w->eps);
        rotate(m, s, x, b);
    }
}

/* x += GroupedQueryAttention(norm(x)). The thread of a share makes its queries, and stores the new key and value if
   they are in it. */
static void grouped_query(const model *m, const layer *l, const buffers *s) {
    long n = m->heads / m->groups, d = m->head, shares = count_shares(m, l);
    const float *h = normalize(m, s, s->x, &l->attention_norm, m->width);
    project(m->weights, m->batch, l->q, h, NULL, s->q, m->heads * d, m->width);
    project(m->weights, m->batch, l->k, h, NULL, s->k, m->groups * d, m->width);
    project(m->weights, m->batch, l->v, h, NULL, s->v, m->groups * d, m->width);
#pragma omp barrier
    if (l->k_conv.taps) {
#pragma omp for schedule(static)
        for (long t = 0; t < 2 * m->batch; t++)
            convolve(m, s, t % 2 ? &l->v_conv : &l->k_conv, (t % 2 ? s->v : s->k) + t / 2 * m->groups * d, t / 2,
                     m->groups * d);
    }
#pragma omp for schedule(static)
    for (long t = 0; t < m->batch * m->groups * shares; t++) {
        long group = t / shares, b = group / m->groups, slot = slot_of(l, m->lengths[b]), count;
        long first = first_key(m, l, b, t % shares, shares, &count);
        float *q = own_of_thread(s), *k = s->k + group * d;
        memcpy(q, s->q + group * n * d, n * d * sizeof(float));
        norm_and_rotate(m, s, &l->q_norm, q, b, n);
        if (first <= slot && slot < first + count) {
            norm_and_rotate(m, s, &l->k_norm, k, b, 1);
            store_row(&l->keys, group * l->slots + slot, k);
            store_row(&l->values, group * l->slots + slot, s->v + group * d);
        }
        attend(m, l, s, q, s->out, b, group % m->groups, t % shares, shares);
    }
    if (shares > 1) combine(m, s, s->out, shares);
    project_out(m, l, s);
}

/* y (n) = numbers of a head's query from number `from` on, times those of q_norm. */
static void norm_query(const model *m, const buffers *s, const norm *w, const float *q, float *y, long from, long n) {
    const float *weight = in_fp32(m, s, w->weight, m->head);
    float inverse = weight ? 1 / sqrtf(dot(q, q, m->head) / m->head + w->eps) : 1;
    for (long i = 0; i < n; i++) y[i] = q[from + i] * inverse * (weight ? weight[from + i] : 1);
}

/* In fp32: what multiplies a query in place of its keys, which are cached without; NULL if they are not. */
static const float *key_norm_weight(const model *m, const layer *l, const buffers *s) {
    return l->key_factor.codes ? in_fp32(m, s, l->k_norm.weight, m->head) : NULL;
}

/* The queries that attend to latents, mixed (B, H, r + dr) = [q_nope W_uk | RoPE(q_rope)], 32 columns at a time. In
   kv_b are each head's W_uk (dn, r) and W_uv (dv, r). The weight of a key's norm, if it is cached, is the query's. */
static void absorb_queries(const model *m, const layer *l, const buffers *s) {
    long wide = key_width(m), r = m->rank, blocks = (r + SLICE - 1) / SLICE + 1;
#pragma omp for schedule(static)
    for (long t = 0; t < m->heads * blocks; t++) {
        long h = t / blocks, c = t % blocks * SLICE, n = min(r - c, SLICE);
        const char *w_uk = at(m, l->kv_b, h * (m->nope + m->dv) * r + c);
        for (long b = 0; b < m->batch; b++) {
            const float *q = s->q + (b * m->heads + h) * m->head;
            float *y = s->mixed + (b * m->heads + h) * wide;
            if (t % blocks == blocks - 1) { /* one more than the columns need */
                norm_query(m, s, &l->q_norm, q, y + r, m->nope, m->rope);
                rotate(m, s, y + r, b);
                const float *key_weight = key_norm_weight(m, l, s);
                for (long i = 0; key_weight && i < m->rope; i++) y[r + i] *= key_weight[m->nope + i];
            } else {
                float sums[SLICE] = {0}, *q_nope = own_of_thread(s);
                norm_query(m, s, &l->q_norm, q, q_nope, 0, m->nope);
                const float *key_weight = key_norm_weight(m, l, s);
                for (long j = 0; key_weight && j < m->nope; j++) q_nope[j] *= key_weight[j];
                for (long j = 0; j < m->nope; j++) {
                    const float *w = in_fp32(m, s, at(m, w_uk, j * r), n);
                    for (long i = 0; i < n; i++) sums[i] += q_nope[j] * w[i];
                }
                memcpy(y + c, sums, n * sizeof(float));
            }
        }
    }
}

/* 1 / rms of the new token's key [W_uk c | k_rope] of each head, to the cache. latents: [c | k_rope] (B, r + dr). */
static void cache_key_factors(const model *m, const layer *l, const float *latents) {
    long H = m->heads, r = m->rank, wide = key_width(m);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < m->batch * H; t++) {
        const float *c = latents + t / H * wide;
        const char *w_uk = at(m, l->kv_b, t % H * (m->nope + m->dv) * r);
        float squares = dot(c + r, c + r, m->rope);
        for (long j = 0; j < m->nope; j++) {
            float k = weight_dot(m->weights, at(m, w_uk, j * r), c, r);
            squares += k * k;
        }
        float factor = 1 / sqrtf(squares / m->head + l->k_norm.eps);
        store_row(&l->key_factor, t * l->slots + slot_of(l, m->lengths[t / H]), &factor);
    }
}

/* x += MultiHeadLatentAttention(norm(x)) in its absorbed form: all heads attend to the latents in the cache. */
static void multi_head_latent(const model *m, const layer *l, const buffers *s) {
    long wide = key_width(m), r = m->rank, rows = m->heads * m->dv, shares = count_shares(m, l);
    const float *h = normalize(m, s, s->x, &l->attention_norm, m->width);
    project(m->weights, m->batch, l->kv_a, h, NULL, s->k, wide, m->width);
    if (m->q_rank) {
        project(m->weights, m->batch, l->q_a, h, NULL, s->q_latent, m->q_rank, m->width);
#pragma omp barrier
        h = normalize(m, s, s->q_latent, &l->q_a_norm, m->q_rank);
    }
    project(m->weights, m->batch, l->q, h, NULL, s->q, m->heads * m->head, m->q_rank ? m->q_rank : m->width);
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (long b = 0; b < m->batch; b++) { /* [c | k_rope] to the cache */
        float *own = s->k + b * wide;
        if (l->k_conv.taps) convolve(m, s, &l->k_conv, own, b, wide);
        norm_row(own, in_fp32(m, s, l->kv_a_norm.weight, r), own, r, l->kv_a_norm.eps);
        if (l->k_norm.weight && !l->key_factor.codes)
            norm_row(own + r, in_fp32(m, s, l->k_norm.weight, m->rope), own + r, m->rope, l->k_norm.eps);
        rotate(m, s, own + r, b);
        store_row(&l->keys, b * l->slots + slot_of(l, m->lengths[b]), own);
    }
    if (l->key_factor.codes) {
#pragma omp barrier
        cache_key_factors(m, l, s->k);
    }
    absorb_queries(m, l, s);
#pragma omp for schedule(static)
    for (long t = 0; t < m->batch * shares; t++)
        attend(m, l, s, s->mixed + t / shares * m->heads * wide, s->context, t / shares, 0, t % shares, shares);
    if (shares > 1) combine(m, s, s->context, shares);
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) { /* W_uv: from the mean latents to values */
        long head = i / m->dv;
        const char *w_uv = at(m, l->kv_b, (head * (m->nope + m->dv) + m->nope + i % m->dv) * r);
        for (long b = 0; b < m->batch; b++)
            s->out[b * rows + i] = weight_dot(m->weights, w_uv, s->context + (b * m->heads + head) * r, r);
    }
    project_out(m, l, s);
}

/* x = the tokens' embeddings, and the angles of RoPE at their positions. The product of position and frequency is
   rounded to fp32 as in model.rope_angles. */
static void begin(const model *m, const buffers *s, const int64_t *ids, long step) {
    long half = m->rope / 2;
#pragma omp for schedule(static)
    for (long b = 0; b < m->batch; b++) {
        widen(m->weights, at(m, m->embedding, ids[b * step] * m->width), s->x + b * m->width, m->width);
        for (long i = 0; i < half; i++) {
            float angle = (float)m->lengths[b] * m->frequency[i];
            s->cosine[b * half + i] = cosf(angle) * m->rope_factor;
            s->sine[b * half + i] = sinf(angle) * m->rope_factor;
        }
    }
}

/* Whether each id is a token, there is room for it, and its query sees every key that a layer holds: no mask. */
static int can_step(const model *m, const int64_t *ids, long step) {
    for (long b = 0; b < m->batch; b++) {
        if (ids[b * step] < 0 || ids[b * step] >= m->vocab) return 0;
        if (m->lengths[b] < 0 || (m->lengths[b] >= m->max_len && !m->endless)) return 0;
        for (const layer *l = m->layers; l < m->layers + m->n_layer; l++)
            if (l->window && min(m->lengths[b] + 1, l->slots) > l->sinks + l->window) return 0;
    }
    return 1;
}

/* One step of m: token ids (B), `step` apart -> hidden states (B, C); the cache then holds a token more of each row.
   Returns 1 if it could not do it, and has then changed nothing, else 0. */
int decode_step(const model *m, const int64_t *ids, long step, float *hidden) {
    if (!can_step(m, ids, step)) return 1;
    const buffers s = divide_scratch(m);
#pragma omp parallel num_threads(m->threads)
    {
        begin(m, &s, ids, step);
        for (const layer *l = m->layers; l < m->layers + m->n_layer; l++) {
            m->rank ? multi_head_latent(m, l, &s) : grouped_query(m, l, &s);
            mlp(m, l, &s);
        }
#pragma omp for schedule(static)
        for (long b = 0; b < m->batch; b++)
            norm_row(s.x + b * m->width, in_fp32(m, &s, m->final_norm.weight, m->width), hidden + b * m->width,
                     m->width, m->final_norm.eps);
    }
    for (long b = 0; b < m->batch; b++) m->lengths[b]++;
    return 0;
}

/* y (B, rows) = x W^T for few rows of x (B, n), by `threads` threads; packed: room for `pack`, if B > 1. w is in
   a format. */
void few_rows_linear(const char *w, const float *x, float *packed, float *y, long batch, long rows, long n, long format,
                     long threads) {
    (void)threads; /* not used without OpenMP */
#pragma omp parallel num_threads(threads)
    {
        if (batch > 1) pack(x, NULL, NULL, packed, batch, n);
        project(format, batch, w, batch > 1 ? packed : x, NULL, y, rows, n);
    }
}
