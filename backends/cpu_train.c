/* The parts of model.py for which torch makes many passes over memory in training, forward and backward, in fp32 on all
   cores: RMSNorm, SwiGLU, causal attention, cross-entropy. cpu_train.py calls these functions.

   At a given number of threads results repeat to the last bit. An int that is returned is 1 if there is no memory. */
#include "cpu.h"

enum { QUERIES = 48, SHARES = 64 };

/* y = x / rms(x) * w for each row of x (rows, n). */
void rms_norm(const float *x, const float *w, float *y, long rows, long n, float eps) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 15)
    for (long r = 0; r < rows; r++) norm_row(x + r * n, w, y + r * n, n, eps);
}

/* Gradients of `rms_norm`: dx (rows, n) and dw (n). dw is summed over SHARES parts of the rows, so that it does not
   depend on the number of threads. */
int rms_norm_backward(const float *x, const float *w, const float *dy, float *dx, float *dw, long rows, long n,
                      float eps) {
    float *sums = calloc(SHARES * n, sizeof(float));
    if (!sums) return 1;
#pragma omp parallel for schedule(static)
    for (long s = 0; s < SHARES; s++)
        for (long r = rows * s / SHARES; r < rows * (s + 1) / SHARES; r++) {
            const float *x_r = x + r * n, *dy_r = dy + r * n;
            float *dx_r = dx + r * n, *dw_s = sums + s * n, along = 0;
            float scale = 1 / sqrtf(dot(x_r, x_r, n) / n + eps);
            for (long i = 0; i < n; i++) along += dy_r[i] * w[i] * x_r[i];
            along *= scale * scale / n;
            for (long i = 0; i < n; i++) {
                dx_r[i] = scale * (dy_r[i] * w[i] - x_r[i] * along);
                dw_s[i] += dy_r[i] * x_r[i] * scale;
            }
        }
    memset(dw, 0, n * sizeof(float));
    for (long s = 0; s < SHARES; s++)
        for (long i = 0; i < n; i++) dw[i] += sums[s * n + i];
    free(sums);
    return 0;
}

/* y (rows, n) = silu(gate) up. Given the gradient dy (rows, n), also those of gate and up. The rows of gate, up and
   their gradients are `step` apart. y or dy may be NULL. */
void swiglu(const float *gate, const float *up, const float *dy, float *y, float *dgate, float *dup, long rows, long n,
            long step) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 13)
    for (long r = 0; r < rows; r++) {
        const float *g = gate + r * step, *u = up + r * step;
        for (long i = 0; i < n; i += LANES) {
            if (y) gated(g + i, u + i, NULL, y + r * n + i, NULL, n - i);
            if (dy) gated(g + i, u + i, dy + r * n + i, dgate + r * step + i, dup + r * step + i, n - i);
        }
    }
}

/* Cross-entropy of each row of logits (rows, n) to its target. The logits become their own gradient, softmax minus
   one-hot. Both are 0 where the target is negative. */
void cross_entropy(float *logits, const int64_t *targets, float *losses, long rows, long n) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        float *x = logits + r * n;
        losses[r] = 0;
        if (targets[r] < 0) memset(x, 0, n * sizeof(float));
        if (targets[r] < 0) continue;
        float best = largest(x, n, -INFINITY), own = x[targets[r]];
        vec sums = {0};
        for (long i = 0; i < n; i += LANES) {
            vec e = exponential(load_part(x + i, n - i, -INFINITY) - best);
            store_part(x + i, e, n - i), sums += e;
        }
        float sum = sum_vec(sums), scale = 1 / sum;
        for (long i = 0; i < n; i++) x[i] *= scale;
        losses[r] = logf(sum) + best - own;
        x[targets[r]] -= 1;
    }
}

/* A tensor (batch, heads, tokens, width): how far the next of each of the first three is. Rows are contiguous. */
typedef struct {
    float *x;
    long batch, head, token;
} tensor;

static float *at(const tensor *t, long b, long h, long i) { return t->x + b * t->batch + h * t->head + i * t->token; }

/* Numbers in a row of keys or scores: whole tiles, and one more, since rows 2^n apart share few cache lines. */
static long padded(long tokens) { return whole_columns(tokens) + COLUMNS; }

/* y (m, n) = a (m, k) b (k, n); n is a multiple of COLUMNS */
static void multiply(const float *a, long a_row, const float *b, long b_row, float *y, long y_row, long m, long n,
                     long k) {
    for (long c = 0; c < n; c += COLUMNS)
        for (long r = 0; r < m; r += ROWS)
            tile(a + r * a_row, a_row, 1, m - r, b + c, b_row, k, y + r * y_row + c, y_row, 0, 0);
}

/* x (rows, n) -> (n, wide), zeros after the rows */
static void transpose(const float *x, long step, float *y, long rows, long n, long wide) {
    for (long c = 0; c < wide; c += COLUMNS)
        for (long i = 0; i < n; i++)
            for (long u = c; u < c + COLUMNS; u++) y[i * wide + u] = u < rows ? x[u * step + i] : 0;
}

/* p (rows, wide) = x (rows, n) keys (n, wide): `rows` queries from number `first` on, of which query i sees the keys
   0..i. ROWS of them at a time, so that few products are wasted on later keys. */
static void queries_by_keys(const float *x, long x_row, const float *keys, float *p, long wide, long first, long rows,
                            long n) {
    for (long r = 0, seen; r < rows; r += ROWS) {
        seen = whole_columns(first + min(r + ROWS, rows));
        multiply(x + r * x_row, x_row, keys, wide, p + r * wide, wide, min(rows - r, ROWS), seen, n);
    }
}

/* y (rows, n) = p (rows, keys) v (keys, n) */
static void mix(const float *p, long wide, const float *v, long v_row, float *y, long y_row, long first, long rows,
                long n) {
    for (long r = 0; r < rows; r += ROWS) {
        long count = min(rows - r, ROWS);
        multiply(p + r * wide, wide, v, v_row, y + r * y_row, y_row, count, n, first + r + count);
    }
}

/* y (keys, n) += p^T (keys, rows) x (rows, n) */
static void mix_back(const float *p, long wide, const float *x, long x_row, float *y, long y_row, long first, long rows,
                     long n) {
    for (long c = 0; c < n; c += COLUMNS)
        for (long key = 0; key < first + rows; key += ROWS) {
            long from = key > first ? key - first : 0; /* earlier queries do not see it */
            tile(p + from * wide + key, 1, wide, first + rows - key, x + from * x_row + c, x_row, rows - from,
                 y + key * y_row + c, y_row, 1, 0);
        }
}

/* p = softmax(scale p) over the first `seen` of `most` numbers, 0 for the others; returns the logarithm of the sum of
   exponentials. As in torch, a row of only -inf gets no weights, and NaN as its gradients. */
static float softmax(float *p, long seen, long most, float scale) {
    for (long j = seen; j < most; j++) p[j] = -INFINITY;
    float best = largest(p, seen, -INFINITY);
    if (best == -INFINITY) {
        for (long j = 0; j < most; j++) p[j] = p[j] == -INFINITY ? 0 : NAN; /* `largest` passes over NaN */
        return NAN;
    }
    vec sums = {0};
    for (long j = 0; j < most; j += LANES) {
        vec e = exponential((load(p + j) - best) * scale);
        store(p + j, e), sums += e;
    }
    float sum = sum_vec(sums), weight = 1 / sum;
    for (long j = 0; j < most; j++) p[j] *= weight;
    return best * scale + logf(sum);
}

/* Causal attention, y = softmax(scale q k^T) v, and logs (batch, heads, tokens), which the backward pass needs: the
   logarithms of the sums of exponentials. heads / groups query heads share a key head. d and dv are multiples of
   COLUMNS, and scale is positive. */
int causal(const tensor *q, const tensor *k, const tensor *v, const tensor *y, float *logs, long batch, long heads,
           long groups, long tokens, long d, long dv, float scale) {
    long wide = padded(tokens), failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (long own = 0; own < batch * groups; own++) {
        long b = own / groups, g = own % groups, each = heads / groups;
        float *keys = aligned_alloc(64, (d + QUERIES) * wide * sizeof(float)), *p = keys + d * wide;
        failed |= !keys;
        if (!keys) continue;
        transpose(at(k, b, g, 0), k->token, keys, tokens, d, wide);
        for (long h = g * each; h < (g + 1) * each; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long rows = min(tokens - first, QUERIES);
                queries_by_keys(at(q, b, h, first), q->token, keys, p, wide, first, rows, d);
                for (long i = 0; i < rows; i++) {
                    long most = whole_columns(first + min(i / ROWS * ROWS + ROWS, rows));
                    logs[(b * heads + h) * tokens + first + i] = softmax(p + i * wide, first + i + 1, most, scale);
                }
                mix(p, wide, at(v, b, g, 0), v->token, at(y, b, h, first), y->token, first, rows, dv);
            }
        free(keys);
    }
    return failed;
}

/* From scores in p and dy v^T in ds: the softmax in p, the gradient of the scores in ds. along: dy . y, which is also
   the sum of p dy v^T over the keys. */
static void softmax_backward(float *p, float *ds, long seen, long most, float scale, float log, float along) {
    for (long j = seen; j < most; j++) p[j] = -INFINITY;
    for (long j = 0; j < most; j += LANES) {
        vec weight = exponential(load(p + j) * scale - log);
        store(p + j, weight), store(ds + j, weight * (load(ds + j) - along) * scale);
    }
}

/* Gradients of `causal`: dq, and added to dk and dv, from dy and from y and logs as `causal` made them (as
   FlashAttention-2, Dao 2023, but with whole rows of scores). */
int causal_backward(const tensor *q, const tensor *k, const tensor *v, const tensor *y, const tensor *dy,
                    const tensor *dq, const tensor *dk, const tensor *dv, const float *logs, long batch, long heads,
                    long groups, long tokens, long d, long v_width, float scale) {
    long wide = padded(tokens), failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
    for (long own = 0; own < batch * groups; own++) {
        long b = own / groups, g = own % groups, each = heads / groups;
        float *keys = aligned_alloc(64, (d + v_width + 2 * QUERIES) * wide * sizeof(float)), *values = keys + d * wide;
        float *p = values + v_width * wide, *ds = p + QUERIES * wide;
        failed |= !keys;
        if (!keys) continue;
        transpose(at(k, b, g, 0), k->token, keys, tokens, d, wide);
        transpose(at(v, b, g, 0), v->token, values, tokens, v_width, wide);
        for (long h = g * each; h < (g + 1) * each; h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                long rows = min(tokens - first, QUERIES);
                const float *dy_0 = at(dy, b, h, first), *y_0 = at(y, b, h, first), *q_0 = at(q, b, h, first);
                queries_by_keys(q_0, q->token, keys, p, wide, first, rows, d);
                queries_by_keys(dy_0, dy->token, values, ds, wide, first, rows, v_width);
                for (long i = 0; i < rows; i++) {
                    long most = whole_columns(first + min(i / ROWS * ROWS + ROWS, rows));
                    float along = dot(y_0 + i * y->token, dy_0 + i * dy->token, v_width);
                    softmax_backward(p + i * wide, ds + i * wide, first + i + 1, most, scale,
                                     logs[(b * heads + h) * tokens + first + i], along);
                }
                mix_back(p, wide, dy_0, dy->token, at(dv, b, g, 0), dv->token, first, rows, v_width);
                mix_back(ds, wide, q_0, q->token, at(dk, b, g, 0), dk->token, first, rows, d);
                mix(ds, wide, at(k, b, g, 0), k->token, at(dq, b, h, first), dq->token, first, rows, d);
            }
        free(keys);
    }
    return failed;
}
