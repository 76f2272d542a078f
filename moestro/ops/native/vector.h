/* Vectors as wide as the variant's registers, with the compiler's own operators: one source for every processor. */

#ifndef MOESTRO_VECTOR_H
#define MOESTRO_VECTOR_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* KERNEL(name) is the exported function name_variant. */
#define PASTE(name, variant) name##_##variant
#define NAMED(name, variant) PASTE(name, variant)
#define KERNEL(name) __attribute__((visibility("default"))) void NAMED(name, VARIANT)

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

/* Kernels cannot raise: where there is no memory they say so, and the process ends. */
static inline void require_memory(int found) {
    if (!found) {
        fputs("moestro: no memory for a compiled kernel\n", stderr);
        abort();
    }
}

/* Where memory is asked for ahead. GCC takes a function that does nothing else for one without an effect, and drops the
   calls that it has not inlined by then. */
#define PREFETCHING static inline __attribute__((always_inline)) void

typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));
typedef int16_t short_vec __attribute__((vector_size(WIDTH * 2)));
typedef uint16_t half_vec __attribute__((vector_size(WIDTH * 2)));

static inline vec load(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

static inline float sum(vec v) {
    float part[WIDTH];
    memcpy(part, &v, sizeof v);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            part[i] += part[i + step];
    return part[0];
}

/* bfloat16 is the upper half of a float32. */
static inline float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline vec load_bfloat16(const uint16_t *from) {
    half_vec bits;
    memcpy(&bits, from, sizeof bits);
    ivec wide = __builtin_convertvector(bits, ivec) << 16;
    vec v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

typedef int8_t sbyte_vec __attribute__((vector_size(WIDTH)));

static inline vec load_int8(const int8_t *from) {
#if defined(__AVX512F__)
    /* compilers take it apart */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    sbyte_vec bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, short_vec), ivec), vec);
#endif
}

/* float8 is a sign, 4 bits of exponent and 3 of fraction (e4m3fn: no infinities, all bits set is not a number); a
   float32 of the same bits, moved to its place, is 2^120 times too small. */
static inline float float8_number(uint8_t code) {
    uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = code & 0x7f;
    uint32_t bits = rest == 0x7f ? 0x7fc00000 : (rest << 20) + (120u << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (rest < 8) /* the fraction alone: no number of float32 is so small that it has no leading bit */
        value = (float)rest * 0x1p-9f;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof bits);
    return value;
}

static inline vec load_float8(const uint8_t *from) {
#if defined(__AVX512F__)
    /* by way of float16, whose conversion takes numbers of any size */
    __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
    __m256i rest = _mm256_slli_epi16(code, 7), keep = _mm256_set1_epi16((int16_t)0xbf80);
    __mmask16 wrong = _mm256_cmpeq_epi16_mask(_mm256_and_si256(code, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7f));
    rest = _mm256_and_si256(rest, keep);
    rest = _mm256_mask_mov_epi16(rest, wrong, _mm256_set1_epi16(0x7e00));
    return (vec)_mm512_mul_ps(_mm512_cvtph_ps(rest), _mm512_set1_ps(256));
#else
    sbyte_vec bytes;
    memcpy(&bytes, from, sizeof bytes);
    ivec code = __builtin_convertvector(__builtin_convertvector(bytes, short_vec), ivec), rest = code & 0x7f;
    ivec small = rest < 8, wrong = rest == 0x7f, bits = ((rest << 20) + (120 << 23)) | (wrong & 0x7fc00000);
    vec fraction = __builtin_convertvector(rest, vec) * 0x1p-9f;
    ivec fraction_bits;
    memcpy(&fraction_bits, &fraction, sizeof fraction);
    bits = (fraction_bits & small) | (bits & ~small) | (code & INT32_MIN);
    vec v;
    memcpy(&v, &bits, sizeof v);
    return v;
#endif
}

/* row . x and y += scale * row, row in any format; the order of the sums is that of the variant's vectors. */

#define DOT(name, type, load_row, one)                                                                                 \
    static inline float name(const type *row, const float *x, int64_t d) {                                             \
        vec a = {0}, b = {0}, c = {0}, e = {0};                                                                        \
        int64_t i = 0;                                                                                                 \
        for (; i + 4 * WIDTH <= d; i += 4 * WIDTH) {                                                                   \
            a += load_row(row + i) * load(x + i);                                                                      \
            b += load_row(row + i + WIDTH) * load(x + i + WIDTH);                                                      \
            c += load_row(row + i + 2 * WIDTH) * load(x + i + 2 * WIDTH);                                              \
            e += load_row(row + i + 3 * WIDTH) * load(x + i + 3 * WIDTH);                                              \
        }                                                                                                              \
        for (; i + WIDTH <= d; i += WIDTH)                                                                             \
            a += load_row(row + i) * load(x + i);                                                                      \
        float rest = 0;                                                                                                \
        for (; i < d; i++)                                                                                             \
            rest += one(row[i]) * x[i];                                                                                \
        return sum((a + b) + (c + e)) + rest;                                                                          \
    }

#define AS_IS(value) (value)
DOT(dot_float32, float, load, AS_IS)
DOT(dot_bfloat16, uint16_t, load_bfloat16, widened)
DOT(dot_int8, int8_t, load_int8, AS_IS)
DOT(dot_float8, uint8_t, load_float8, float8_number)

#define ADD(name, type, load_row, one)                                                                                 \
    static inline void name(float *y, const type *row, float scale, int64_t d) {                                       \
        int64_t i = 0;                                                                                                 \
        for (; i + WIDTH <= d; i += WIDTH)                                                                             \
            store(y + i, load(y + i) + load_row(row + i) * scale);                                                     \
        for (; i < d; i++)                                                                                             \
            y[i] += one(row[i]) * scale;                                                                               \
    }

ADD(add_float32, float, load, AS_IS)
ADD(add_bfloat16, uint16_t, load_bfloat16, widened)
ADD(add_int8, int8_t, load_int8, AS_IS)
ADD(add_float8, uint8_t, load_float8, float8_number)

/* Rounded to the nearest, ties to even; what is not a number stays so. */
static inline void store_bfloat16(uint16_t *to, vec v) {
    ivec bits, wrong = v != v;
    memcpy(&bits, &v, sizeof v);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    half_vec half = __builtin_convertvector((bits & ~wrong) | (wrong & 0x7fc0), half_vec);
    memcpy(to, &half, sizeof half);
}

static inline vec choose(ivec condition, vec yes, vec no) {
    ivec a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    a = (a & condition) | (b & ~condition);
    memcpy(&yes, &a, sizeof a);
    return yes;
}

/* e^r for r within half of log 2. */
static inline vec exponential_near_0(vec r) {
    return (((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
             1.6666665459e-1f) * r + 5.0000001201e-1f) * (r * r) + r + 1.0f;
}

/* e^x to about two units in the last place; beyond +-87 as if x were there. */
static inline vec exponential(vec x) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: added, it leaves no room for a fraction */
    const vec most = (vec){0} + 87.0f;
    x = choose(x > most, most, choose(x < -most, -most, x));
    vec n = (x * 1.44269504088896f + whole) - whole;
    vec p = exponential_near_0((x - n * 0.693359375f) + n * 2.12194440e-4f);
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

#endif
