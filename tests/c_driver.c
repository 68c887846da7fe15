/* Compares the C of backends/ with the same maths in double precision, without Python, so that it runs under sanitizers
   and on an emulated CPU. Prints a line for each function; exit status 1 if one is off. See test_c_driver.py. */
#include "../backends/cpu_train.c"

#include <stdio.h>

void few_rows_linear(const char *w, const float *x, float *packed, float *y, long batch, long rows, long n, long format,
                     long threads);

static int wrong = 0;
static uint64_t state = 1;

/* n random numbers in -size..size, in memory of just that size */
static float *randoms(long n, float size) {
    float *x = malloc(n * sizeof(float));
    for (long i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = size * ((double)(state >> 40) / (1 << 23) - 1);
    }
    return x;
}

static float *zeros(long n) { return calloc(n, sizeof(float)); }
static double *doubles(long n) { return calloc(n, sizeof(double)); }

/* Frees both. The bound is relative to the largest number. */
static void compare(const char *name, float *got, double *expected, long n) {
    double off = 0, size = 0.01;
    for (long i = 0; i < n; i++) size = fmax(size, fabs(expected[i]));
    for (long i = 0; i < n; i++) off = !(fabs(got[i] - expected[i]) <= off) ? fabs(got[i] - expected[i]) : off;
    int bad = !(off <= 1e-5 * size);
    printf("%-16s %5ld numbers, off by %.1e of %.1e%s\n", name, n, off, size, bad ? ": WRONG" : "");
    wrong |= bad, free(got), free(expected);
}

static void norms(long rows, long n) {
    float *x = randoms(rows * n, 2), *w = randoms(n, 1), *dy = randoms(rows * n, 1), eps = 1e-5;
    float *y = zeros(rows * n), *dx = zeros(rows * n), *dw = zeros(n);
    double *ys = doubles(rows * n), *dxs = doubles(rows * n), *dws = doubles(n);
    rms_norm(x, w, y, rows, n, eps);
    if (rms_norm_backward(x, w, dy, dx, dw, rows, n, eps)) exit(2);
    for (long r = 0; r < rows * n; r += n) {
        double squares = 0, along = 0;
        for (long i = r; i < r + n; i++) squares += (double)x[i] * x[i], along += (double)dy[i] * w[i - r] * x[i];
        double scale = 1 / sqrt(squares / n + eps);
        for (long i = r; i < r + n; i++) {
            ys[i] = x[i] * scale * w[i - r], dws[i - r] += dy[i] * x[i] * scale;
            dxs[i] = scale * (dy[i] * w[i - r] - x[i] * along * scale * scale / n);
        }
    }
    compare("rms_norm", y, ys, rows * n), compare("its dx", dx, dxs, rows * n), compare("its dw", dw, dws, n);
    free(x), free(w), free(dy);
}

static void gates(long rows, long n) {
    long step = n + 3, all = rows * step;
    float *gate = randoms(all, 40), *up = randoms(all, 2), *dy = randoms(rows * n, 1);
    float *y = zeros(rows * n), *dgate = zeros(all), *dup = zeros(all);
    double *ys = doubles(rows * n), *dgates = doubles(all), *dups = doubles(all);
    swiglu(gate, up, dy, y, dgate, dup, rows, n, step);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < n; i++) {
            double a = gate[r * step + i], b = up[r * step + i], d = dy[r * n + i], s = 1 / (1 + exp(-a));
            ys[r * n + i] = a * s * b, dups[r * step + i] = d * a * s;
            dgates[r * step + i] = d * b * s * (1 + a * (1 - s));
        }
    compare("swiglu", y, ys, rows * n), compare("its dgate", dgate, dgates, all), compare("its dup", dup, dups, all);
    free(gate), free(up), free(dy);
}

static void losses(long rows, long n) {
    float *x = randoms(rows * n, 20), *loss = zeros(rows);
    int64_t *targets = calloc(rows, sizeof *targets);
    double *grads = doubles(rows * n), *expected = doubles(rows);
    for (long r = 0; r < rows; r++) {
        targets[r] = r % 4 == 3 ? -1 : r * 7 % n;
        if (targets[r] < 0) continue;
        double sum = 0;
        for (long i = 0; i < n; i++) sum += exp(x[r * n + i]);
        for (long i = 0; i < n; i++) grads[r * n + i] = exp(x[r * n + i]) / sum - (i == targets[r]);
        expected[r] = log(sum) - x[r * n + targets[r]];
    }
    cross_entropy(x, targets, loss, rows, n);
    compare("cross_entropy", loss, expected, rows), compare("its gradient", x, grads, rows * n), free(targets);
}

/* (B, T, H, n) in memory */
static tensor shaped(float *x, long heads, long tokens, long n) {
    return (tensor){x, tokens * heads * n, n, heads * n};
}

static void attention(long B, long H, long G, long T, long D, long Dv, float scale) {
    long nq = B * T * H * D, nk = B * T * G * D, nv = B * T * G * Dv, ny = B * T * H * Dv;
    float *xs[] = {randoms(nq, 1), randoms(nk, 1), randoms(nv, 1), zeros(ny), randoms(ny, 1), zeros(nq), zeros(nk), zeros(nv)};
    double *ys = doubles(ny), *dqs = doubles(nq), *dks = doubles(nk), *dvs = doubles(nv), *p = doubles(T), *ds = doubles(T);
    float *logs = zeros(B * H * T);
    tensor q = shaped(xs[0], H, T, D), k = shaped(xs[1], G, T, D), v = shaped(xs[2], G, T, Dv), y = shaped(xs[3], H, T, Dv);
    tensor dy = shaped(xs[4], H, T, Dv), dq = shaped(xs[5], H, T, D), dk = shaped(xs[6], G, T, D), dv = shaped(xs[7], G, T, Dv);
    if (causal(&q, &k, &v, &y, logs, B, H, G, T, D, Dv, scale)) exit(2);
    if (causal_backward(&q, &k, &v, &y, &dy, &dq, &dk, &dv, logs, B, H, G, T, D, Dv, scale)) exit(2);
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++)
            for (long i = 0; i < T; i++) {
                long g = h / (H / G);
                const float *q_i = at(&q, b, h, i), *dy_i = at(&dy, b, h, i);
                double sum = 0, along = 0, *y_i = ys + (at(&y, b, h, i) - xs[3]), *dq_i = dqs + (q_i - xs[0]);
                for (long j = 0; j <= i; j++) {
                    double score = 0;
                    for (long c = 0; c < D; c++) score += (double)q_i[c] * at(&k, b, g, j)[c];
                    sum += p[j] = exp(scale * score), ds[j] = 0;
                    for (long c = 0; c < Dv; c++) ds[j] += (double)dy_i[c] * at(&v, b, g, j)[c];
                }
                for (long j = 0; j <= i; j++) p[j] /= sum, along += p[j] * ds[j];
                for (long j = 0; j <= i; j++) {
                    const float *k_j = at(&k, b, g, j), *v_j = at(&v, b, g, j);
                    double s = p[j] * (ds[j] - along) * scale;
                    for (long c = 0; c < Dv; c++) y_i[c] += p[j] * v_j[c], dvs[v_j - xs[2] + c] += p[j] * dy_i[c];
                    for (long c = 0; c < D; c++) dq_i[c] += s * k_j[c], dks[k_j - xs[1] + c] += s * q_i[c];
                }
            }
    compare("causal", xs[3], ys, ny), compare("its dq", xs[5], dqs, nq);
    compare("its dk", xs[6], dks, nk), compare("its dv", xs[7], dvs, nv);
    free(xs[0]), free(xs[1]), free(xs[2]), free(xs[4]), free(logs), free(p), free(ds);
}

static void linear(long batch, long rows, long n) {
    float *w = randoms(rows * n, 1), *x = randoms(batch * n, 1), *y = zeros(batch * rows), *packed = zeros(128 * n);
    double *expected = doubles(batch * rows);
    few_rows_linear((const char *)w, x, packed, y, batch, rows, n, 0, 2); /* 0: fp32 */
    for (long b = 0; b < batch; b++)
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < n; i++) expected[b * rows + r] += (double)w[r * n + i] * x[b * n + i];
    compare("few_rows_linear", y, expected, batch * rows), free(w), free(x), free(packed);
}

int main(void) {
    norms(1, 1), norms(5, 13), norms(200, 64), gates(1, 1), gates(3, 21), gates(40, 300);
    losses(5, 3), losses(9, 100), attention(1, 1, 1, 1, 16, 16, 1), attention(2, 4, 2, 50, 32, 16, 0.2);
    attention(1, 3, 1, 101, 48, 64, 0.1), linear(1, 5, 7), linear(1, 100, 96), linear(3, 33, 70), linear(40, 65, 64);
    return wrong;
}
