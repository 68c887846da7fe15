/* How numbers are stored: the formats of a cache (nanokv/quantization.py has the codes) and of weights. They are read
   as fp32 vectors, half a unit at a time, and written from fp32. */
#pragma once

#include "cpu.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
enum format { FP32, BF16, FP16, INT8, FP8, INT4 };
#ifdef __AVX512BW__
enum { WIDE = 16 }; /* numbers in the widest vector */
#else
enum { WIDE = 8 };
#endif
/* The halves of a unit are its first and last numbers; of FP8 and INT4 its even and odd ones. */
enum { UNIT = 2 * WIDE, GROUP4 = 32, GROUP8 = 128 };
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t iwide __attribute__((vector_size(4 * WIDE)));
typedef int16_t swide __attribute__((vector_size(2 * WIDE), aligned(1), may_alias));
typedef int16_t sunit __attribute__((vector_size(2 * UNIT)));
typedef uint16_t uswide __attribute__((vector_size(2 * WIDE), aligned(1), may_alias));
typedef int8_t cwide __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef int8_t cunit __attribute__((vector_size(UNIT), aligned(1), may_alias));
typedef uint8_t ucwide __attribute__((vector_size(WIDE), aligned(1), may_alias));

/* WIDE integers of 8 or 16 bits at x, as 32 bits; TO_16: UNIT of 8 bits as 16. gcc makes one instruction of
   the intrinsics only. */
#ifdef __AVX512BW__
#define UNSIGNED_8(x) (iwide) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(x)))
#define SIGNED_8(x) (iwide) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(x)))
#define UNSIGNED_16(x) (iwide) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x)))
#define TO_16(x) (sunit) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(x)))
#elif defined __AVX2__
#define UNSIGNED_8(x) (iwide) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(x)))
#define SIGNED_8(x) (iwide) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(x)))
#define UNSIGNED_16(x) (iwide) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(x)))
#define TO_16(x) (sunit) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x)))
#else
#define UNSIGNED_8(x) __builtin_convertvector(*(const ucwide *)(x), iwide)
#define SIGNED_8(x) __builtin_convertvector(*(const cwide *)(x), iwide)
#define UNSIGNED_16(x) __builtin_convertvector(*(const uswide *)(x), iwide)
#define TO_16(x) __builtin_convertvector(*(const cunit *)(x), sunit)
#endif

/* Bytes of n numbers. */
INLINE long bytes_of(enum format f, long n) {
    return f == FP32 ? 4 * n : f < INT8 ? 2 * n : f == INT4 ? (n + 1) / 2 : n;
}

/* WIDE numbers, kept in a register: gcc would read memory again for each of their uses. */
INLINE wide load_once(const float *x) {
    wide y = *(const wide *)x;
#ifdef __AVX__
    __asm__("" : "+v"(y));
#endif
    return y;
}

/* fp16 to fp32 */
INLINE wide from_half(swide x) {
#ifdef __AVX512BW__
    return (wide)_mm512_cvtph_ps((__m256i)x);
#elif defined __AVX2__ && defined __F16C__
    return (wide)_mm256_cvtph_ps((__m128i)x);
#else
    iwide bits = __builtin_convertvector(x, iwide), special = (bits & 0x7c00) == 0x7c00; /* infinite or NaN */
    wide y = (wide)(bits << 13 & (int)0x8fffe000) * 0x1p112f;
    return (wide)((iwide)y | (special & 0x7f800000));
#endif
}

/* Half h of the unit that begins at x: numbers 0 to WIDE - 1 of it or the rest; of FP8 and INT4 the even or the odd
   ones. Of INT4 they are code * scale + offset, of INT8 the codes, of FP8 the codes times 2^-120. */
INLINE wide load_half(enum format f, const char *x, int h, float scale, float offset) {
    if (f == INT4) {
        iwide codes = UNSIGNED_8(x);
#ifdef __AVX512BW__ /* what each of the 16 codes stands for, looked up */
        const wide sixteen = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return (wide)_mm512_permutexvar_ps((__m512i)(h ? codes >> 4 : codes), (__m512)(sixteen * scale + offset));
#else
        return __builtin_convertvector(h ? codes >> 4 : codes & 15, wide) * scale + offset;
#endif
    }
    if (f == FP8) { /* sign, exponent and mantissa move to where fp32 has them; the exponent is then too small by 120 */
        iwide two = (iwide)(TO_16(x) << 4);
        return (wide)((h ? two : two << 16) & (int)0x87f00000);
    }
    x += bytes_of(f, h * WIDE);
    if (f == BF16) return (wide)(UNSIGNED_16(x) << 16);
    if (f == FP16) return from_half(*(const swide *)x);
    if (f == INT8) return __builtin_convertvector(SIGNED_8(x), wide);
    return load_once((const float *)x);
}

/* y = n numbers of format FP32, BF16, FP16 or INT8. */
INLINE void widen_from(enum format f, const char *x, float *y, long n) {
    for (; n >= WIDE; n -= WIDE, x += bytes_of(f, WIDE), y += WIDE) *(wide *)y = load_half(f, x, 0, 1, 0);
    if (!n) return;
    char last[4 * WIDE] = {0};
    wide a = load_half(f, memcpy(last, x, bytes_of(f, n)), 0, 1, 0);
    memcpy(y, &a, n * sizeof(float));
}

static void widen(enum format f, const void *x, float *y, long n) {
    if (f == FP32) memcpy(y, x, n * sizeof(float));
    if (f == BF16) widen_from(BF16, x, y, n);
    if (f == FP16) widen_from(FP16, x, y, n);
    if (f == INT8) widen_from(INT8, x, y, n);
}

/* x rounded to a sign, 8, 5 or 4 bits of exponent (its bias given) and some of mantissa, half to even. */
INLINE uint32_t narrow(float x, int mantissa, int bias) {
    union { float f; uint32_t bits; } a = {x}, tiny = {ldexpf(1, 24 - bias - mantissa)};
    uint32_t size = bias == 7 ? 7 : 15, sign = a.bits >> 31 << size, shift = 23 - mantissa, most = (1u << size) - 1;
    a.bits &= 0x7fffffff;
    if (a.bits > 0x7f800000) return sign | most; /* NaN */
    if (a.bits < (uint32_t)(128 - bias) << 23) { /* subnormal: an addition rounds it */
        a.f += tiny.f;
        return sign | (a.bits - tiny.bits);
    }
    a.bits += (1u << (shift - 1)) - 1 + (a.bits >> shift & 1) - ((127u - bias) << 23);
    uint32_t infinite = bias == 7 ? most : most >> mantissa << mantissa;
    return sign | (a.bits >> shift < infinite ? a.bits >> shift : infinite);
}

/* n numbers x to format FP32, BF16 or FP16. */
static void narrow_row(enum format f, const float *x, void *y, long n) {
    if (f == FP32) memcpy(y, x, n * sizeof(float));
    for (long i = 0; i < n; i++) {
        if (f == BF16) ((uint16_t *)y)[i] = narrow(x[i], 7, 127);
        if (f == FP16) ((uint16_t *)y)[i] = narrow(x[i], 10, 15);
    }
}

typedef struct { /* what a cache holds of a vector per token: (B, G, slots, width) numbers, and what belongs to them */
    char *codes, *exact, *scales, *offsets; /* exact: more numbers of the vector, in bf16; scales bf16, offsets int8 */
    long format, width, exact_width, groups;
} part;

static int quantized(const part *a) { return a->format >= INT8; }

/* Codes of n numbers x that share a scale, as nanokv.quantization.quantize makes them. */
static void quantize(const part *a, const float *x, long n, char *codes, char *scale, char *offset) {
    float low = x[0], high = x[0], s;
    int nan = 0; /* a number that is not finite: then all of them are read as NaN */
    for (long i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
        nan |= !(fabsf(x[i]) <= FLT_MAX);
    }
    float largest = fmaxf(fabsf(low), fabsf(high)), most = a->format == FP8 ? 448 : 127;
    s = a->format == INT4 ? fmaxf((high - low) / 15, largest / 127) : largest / most;
    narrow_row(BF16, &(float){nan ? NAN : fmaxf(s, 1e-30f)}, scale, 1);
    widen(BF16, scale, &s, 1);
    float first = fminf(fmaxf(rintf(low / s), -128), 127);
    if (a->format == INT4) *(int8_t *)offset = (int8_t)(nan ? 0 : first), memset(codes, 0, (n + 1) / 2);
    for (long i = 0; i < n && !nan; i++) {
        float code = x[i] / s;
        if (a->format == INT4) codes[i / 2] |= (char)((int)fminf(fmaxf(rintf(code) - first, 0), 15) << 4 * (i % 2));
        if (a->format == INT8) codes[i] = (char)fminf(fmaxf(rintf(code), -127), 127);
        if (a->format == FP8) codes[i] = (char)narrow(fminf(fmaxf(code, -448), 448), 3, 7);
    }
}

/* Put x (width + exact_width) in place of the part's row of this number. */
static void store_row(const part *a, long row, const float *x) {
    char *codes = a->codes + row * bytes_of(a->format, a->width);
    long size = a->format == INT4 ? GROUP4 : GROUP8;
    if (!quantized(a)) narrow_row(a->format, x, codes, a->width);
    for (long g = row * a->groups, i = 0; quantized(a) && i < a->width; i += size, g++)
        quantize(a, x + i, min(a->width - i, size), codes + bytes_of(a->format, i), a->scales + 2 * g,
                 a->format == INT4 ? a->offsets + g : NULL);
    narrow_row(BF16, x + a->width, a->exact + row * 2 * a->exact_width, a->exact_width);
}

/* weight . x over n numbers, weight in fp32 or bf16 */
static float weight_dot(enum format f, const char *w, const float *x, long n) {
    if (f == FP32) return dot((const float *)w, x, n);
    wide a = {0}, b = a, c = a, d = a;
    long i = 0;
    for (; i + 2 * UNIT <= n; i += 2 * UNIT, w += 4 * UNIT) {
        const wide *y = (const wide *)(x + i);
        a += load_half(BF16, w, 0, 1, 0) * y[0], b += load_half(BF16, w, 1, 1, 0) * y[1];
        c += load_half(BF16, w + 2 * UNIT, 0, 1, 0) * y[2], d += load_half(BF16, w + 2 * UNIT, 1, 1, 0) * y[3];
    }
    float sum = 0, rest[2 * UNIT];
    widen(BF16, w, rest, n - i);
    a = (a + b) + (c + d);
    for (long j = 0; j < WIDE; j++) sum += a[j];
    return sum + dot(rest, x + i, n - i);
}
