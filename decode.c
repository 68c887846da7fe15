/* What decoding one token computes on a CPU, in fp32: each function one pass over memory, by all cores.

   native.py compiles and calls it. A step at batch 1 reads every weight for one multiplication each, so it is bound
   by reading, and, through torch's operators, by their number; these take the place of many and read at full speed.

   Matrices are row-major; `step` is from one row to the next. The work is cut the same way at a given number of
   threads, so results repeat to the last bit. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, BLOCK = 32 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
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
    vec sum[2][4] = {{{0}}};
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec x = load(a + i), y = load(b + i);
        for (int j = 0; j < 4; j++) {
            vec z = load(k + j * step + i);
            sum[0][j] += x * z, sum[1][j] += y * z;
        }
    }
    for (int j = 0; j < 4; j++) {
        float s = total(sum[0][j]), t = total(sum[1][j]);
        for (long r = i; r < n; r++) s += a[r] * k[j * step + r], t += b[r] * k[j * step + r];
        p[j] = scale * s, o[j] = scale * t;
    }
}

/* y = y * keep + p v and z = z * kept + o v for `rows` rows of v (rows, n): each is loaded once for both */
static void mix2(const float *p, const float *o, const float *v, long step, long rows, long n, float keep, float kept,
                 float *y, float *z) {
    long c = 0;
    for (; c + 4 * LANES <= n; c += 4 * LANES) {
        vec sum[2][4];
        for (int u = 0; u < 4; u++)
            sum[0][u] = load(y + c + u * LANES) * keep, sum[1][u] = load(z + c + u * LANES) * kept;
        for (long j = 0; j < rows; j++)
            for (int u = 0; u < 4; u++) {
                vec x = load(v + j * step + c + u * LANES);
                sum[0][u] += p[j] * x, sum[1][u] += o[j] * x;
            }
        memcpy(y + c, sum[0], sizeof sum[0]), memcpy(z + c, sum[1], sizeof sum[1]);
    }
    for (; c < n; c++) {
        float s = y[c] * keep, t = z[c] * kept;
        for (long j = 0; j < rows; j++) s += p[j] * v[j * step + c], t += o[j] * v[j * step + c];
        y[c] = s, z[c] = t;
    }
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

/* y = x / rms(x) * w of each row */
void norm(const float *x, const float *w, float *y, long rows, long n, float eps) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 15)
    for (long r = 0; r < rows; r++) {
        float scale = 1 / sqrtf(dot(x + r * n, x + r * n, n) / n + eps);
        for (long i = 0; i < n; i++) y[r * n + i] = x[r * n + i] * scale * w[i];
    }
}

/* y = each row of x (rows, n), `step` apart, with its first `width` numbers turned by RoPE, as model.rotate does */
void rotate(const float *x, const float *cosine, const float *sine, float *y, long rows, long n, long step,
            long width) {
    for (long half = width / 2; rows--; x += step, y += n) {
        for (long i = 0; i < half; i++) {
            y[i] = x[i] * cosine[i] + x[i + half] * sine[i];
            y[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
        }
        memcpy(y + width, x + width, (n - width) * sizeof(float));
    }
}

/* y = W x */
void linear(const float *w, const float *x, float *y, long rows, long n) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) y[r] = dot(w + r * n, x, n);
}

/* y = down (silu(gate x) * up x); hidden: room for `inner` numbers */
void swiglu(const float *gate, const float *up, const float *down, const float *x, float *hidden, float *y, long n,
            long inner) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long r = 0; r < inner; r++) {
            float g = dot(gate + r * n, x, n);
            hidden[r] = g / (1 + expf(-g)) * dot(up + r * n, x, n);
        }
#pragma omp for schedule(static)
        for (long r = 0; r < n; r++) y[r] = dot(down + r * inner, hidden, inner);
    }
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
        long rows = keys - at < BLOCK ? keys - at : BLOCK, j = 0;
        for (; j + 4 <= rows; j += 4)
            for (long i = 0; i < n; i += 2) {
                long other = i + 1 < n ? i + 1 : i;
                dot2x4(q + i * d, q + other * d, k + j * step, step, d, scale, &p[i][j], &p[other][j]);
            }
        for (; j < BLOCK; j++)
            for (long i = 0; i < n; i++) p[i][j] = j < rows ? scale * dot(q + i * d, k + j * step, d) : -FLT_MAX;
        for (long i = 0; i < n; i++) {
            float best = top[i];
            for (j = 0; j < BLOCK; j++) best = p[i][j] > best ? p[i][j] : best;
            vec added = {0};
            for (j = 0; j < BLOCK; j += LANES) {
                vec e = exponential(load(&p[i][j]) - best);
                memcpy(&p[i][j], &e, sizeof e);
                added += e;
            }
            keep[i] = expf(top[i] - best), top[i] = best;
            sum[i] = sum[i] * keep[i] + total(added);
        }
        for (long i = 0; i < n; i += 2) {
            long other = i + 1 < n ? i + 1 : i;
            mix2(p[i], p[other], v, step, rows, dv, keep[i], keep[other], y + i * dv, y + other * dv);
        }
    }
}

/* softmax(scale q k^T) v of each group: q (groups, n, d), k (groups, keys, d), v (groups, keys, dv) -> y like q.
   `group`: from one group's keys to the next's, and values'. The keys are cut in shares, so that cores without a
   group have work, and put together by what each has of the whole softmax ("Flash-Decoding", Dao et al. 2023).
   Returns 0, or 1 if there is no memory. */
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

/* MLA's absorbed attention of one token: q_nope (heads, dn) with rows `step_q` apart, q_rope (heads, dr), latent
   (keys, r + dr), and of each head in w (heads, dn + dv, r) the rows W_uk and W_uv -> y (heads, dv). */
int attend_latent(const float *q_nope, const float *q_rope, const float *latent, const float *w, float *y, long heads,
                  long keys, long dn, long dr, long dv, long r, long step_q, float scale, long shares) {
    float *q = malloc(heads * (2 * r + dr) * sizeof(float)), *out = q + heads * (r + dr);
    if (!q) return 1;
#pragma omp parallel for schedule(static)
    for (long h = 0; h < heads; h++) {
        const float *row = w + h * (dn + dv) * r;
        float *mine = q + h * (r + dr);
        memset(mine, 0, r * sizeof(float));
        for (long i = 0; i < dn; i++, row += r)
            for (long c = 0; c < r; c++) mine[c] += q_nope[h * step_q + i] * row[c];
        memcpy(mine + r, q_rope + h * dr, dr * sizeof(float));
    }
    int failed = attend(q, latent, latent, out, 1, heads, keys, r + dr, r, 0, r + dr, scale, shares);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < heads * dv; t++) y[t] = dot(w + (t / dv * (dn + dv) + dn + t % dv) * r, out + t / dv * r, r);
    free(q);
    return failed;
}
