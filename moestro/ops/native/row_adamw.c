/* AdamW on some rows of a table: gradient row, weights and both moments are read once and written once. */

#include <math.h>
#include <stdlib.h>

#include "places.h"

#define LINE 64

/* Formats of tables, as in table_rows.c. */
enum { FLOAT32, BFLOAT16, INT8, FLOAT8 };

struct row_adamw {
    void *table;   /* [e, d] in a format */
    float *row_scale; /* [e] of codes */
    void *mean;    /* [e, d] float32 where the table is, else bfloat16 */
    float *square; /* [e, d] */
    int32_t *clock;  /* [e] the steps that touched a row; the last step that did where moments do not wait */
    double *charged; /* [e] the logarithm of the decay that a row has had */
    const int64_t *ids;  /* [n] */
    const float *values; /* [n, d]; NULL: row i is the sum of scale * in over the places from starts[i] */
    const int64_t *order, *starts, *token; /* as in table_rows.c */
    const float *in, *scale;
    int64_t d, format, table_key, mean_key, number, moments_wait;
    double beta1, beta2, eps, lr, decay, log_decay, log_decay_after;
};

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t uvec __attribute__((vector_size(WIDTH * 4)));

/* What one row is multiplied by. Its gradient is scale * in, in one rounding. */
struct step {
    const float *in;
    float scale, decay, size, correction, reciprocal, mean_decay, square_decay, weight, beta2, rest, eps;
    uint32_t table_bits, mean_bits;
};

/* A product that is rounded before it is used: compilers join a product and a sum where torch does not. */
static inline vec rounded(vec x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

/* a * b + c, rounded once where the processor has that. */
static inline vec madd(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < WIDTH; i++)
        a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#else
    return rounded(a * b) + c;
#endif
}

static inline vec every(float x) { return (vec){0} + x; }

/* sqrt(x) / correction, each rounded as the processor's own instructions round it, which take more time than the
   rows' way through memory. */
static inline vec corrected_root(vec x, const struct step *s) {
#if defined(__AVX512F__)
    /* Markstein 1990: from an estimate by Newton steps whose remainders are exact. 2^64 keeps small numbers normal. */
    const __m512 half = _mm512_set1_ps(0.5f), c = _mm512_set1_ps(s->correction), r = _mm512_set1_ps(s->reciprocal);
    if (!_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(0x1p60f), _CMP_NLT_UQ)) {
        __m512 a = _mm512_mul_ps((__m512)x, _mm512_set1_ps(0x1p64f));
        __mmask16 some = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        __m512 y = _mm512_maskz_rsqrt14_ps(some, a), g = _mm512_mul_ps(a, y), h = _mm512_mul_ps(y, half);
        __m512 e = _mm512_fnmadd_ps(h, g, half);
        g = _mm512_fmadd_ps(g, e, g), h = _mm512_fmadd_ps(h, e, h);
        g = _mm512_fmadd_ps(_mm512_fnmadd_ps(g, g, a), h, g);
        __m512 q = _mm512_mul_ps(g, r);
        q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, c, g), r, q);
        q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, c, g), r, q);
        return (vec)_mm512_mul_ps(q, _mm512_set1_ps(0x1p-32f));
    }
    return (vec)_mm512_div_ps(_mm512_sqrt_ps((__m512)x), c);
#else
    for (int i = 0; i < WIDTH; i++)
        x[i] = __builtin_sqrtf(x[i]);
    return x / s->correction;
#endif
}

/* The operations of torch's kernels, in their order. */
static inline void update(const struct step *s, vec g, vec *p, vec *m, vec *v) {
    *m = rounded(*m * s->mean_decay), *v = rounded(*v * s->square_decay);
    /* torch's lerp begins at the nearer end */
    *m = s->weight < 0.5f ? madd(every(s->weight), g - *m, *m) : madd(every(s->weight - 1), g - *m, g);
    *v = madd(rounded(g * s->rest), g, rounded(*v * s->beta2));
    *p = rounded(*p * s->decay) + *m * s->size / (corrected_root(*v, s) + s->eps);
}

/* lowbias32: the bits of ops/rounding.py. */
#define MIXED(type, name)                                                                                              \
    static inline type name(type x) {                                                                                  \
        x = (x ^ x >> 16) * 0x7feb352du;                                                                               \
        x = (x ^ x >> 15) * 0x846ca68bu;                                                                               \
        return x ^ x >> 16;                                                                                            \
    }
MIXED(uint32_t, mixed)
MIXED(uvec, mixed_each)

static inline uint32_t row_bits(int64_t id, int64_t key) {
    return mixed(mixed((uint32_t)id ^ (uint32_t)key) + (uint32_t)((uint64_t)id >> 32));
}

/* n numbers of a table, the rest 0. */
static inline vec load_numbers(const void *from, int64_t at, int64_t n, int64_t narrow) {
    vec v = {0};
    uint16_t half[WIDTH] = {0};
    if (!narrow)
        memcpy(&v, (const float *)from + at, n * sizeof(float));
    else {
        memcpy(half, (const uint16_t *)from + at, n * sizeof *half);
        v = load_bfloat16(half);
    }
    return v;
}

static const uint32_t FIRST_COLUMNS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Random bits of numbers from a column of a row on. */
static inline uvec noise_from(uint32_t bits, int64_t column) {
    uvec columns;
    memcpy(&columns, FIRST_COLUMNS, sizeof columns);
    return mixed_each(bits + (columns + (uint32_t)column) * 0x9e3779b9u);
}

/* Into float32 as they are, into bfloat16 rounded stochastically. */
static inline void store_numbers(void *to, int64_t at, vec v, int64_t n, int64_t narrow, uint32_t bits, int64_t column) {
    if (!narrow) {
        memcpy((float *)to + at, &v, n * sizeof(float));
        return;
    }
    uvec number;
    ivec wrong = v != v;
    memcpy(&number, &v, sizeof v);
    number = (number + (noise_from(bits, column) & 0xffff)) >> 16;
    number = (number & ~(uvec)wrong) | (0x7fc0 & (uvec)wrong); /* a sum could carry into the sign */
    half_vec half = __builtin_convertvector(number, half_vec);
    memcpy((uint16_t *)to + at, &half, n * sizeof(uint16_t));
}

/* The first row that the gradient of row i is made of. */
static inline const float *source_of(const struct row_adamw *f, int64_t i) {
    return f->values ? f->values + i * f->d : f->in + f->token[f->starts[i]] * f->d;
}

/* Where the gradient of row i is, or is made, and what it is multiplied by. */
static inline const float *gradient_of(const struct row_adamw *f, int64_t i, float *scale, float *sum) {
    *scale = 1;
    if (!f->values && f->starts[i + 1] == f->starts[i] + 1)
        *scale = f->scale[f->order[f->starts[i]]];
    else if (!f->values) {
        sum_places(f->in, f->token, f->scale, f->order, f->starts[i], f->starts[i + 1], f->d, sum);
        return sum;
    }
    return source_of(f, i);
}

/* Powers of both betas that were needed before, found by the last bits of their exponent. */
#define POWERS 256
struct powers {
    int64_t of;
    double mean, square;
};

static inline struct powers powers_of(const struct row_adamw *f, int64_t n, struct powers *known) {
    struct powers *found = known + (uint64_t)n % POWERS;
    if (n == 0)
        return (struct powers){0, 1, 1};
    if (found->of != n)
        *found = (struct powers){n, pow(f->beta1, (double)n), pow(f->beta2, (double)n)};
    return *found;
}

/* Moves the row's clock to this step. */
static inline struct step step_of(const struct row_adamw *f, int64_t i, float *sum, struct powers *known) {
    int64_t id = f->ids[i], before = f->clock[id], now = f->moments_wait ? before + 1 : f->number;
    struct powers count = powers_of(f, now, known), idle = powers_of(f, now - before - 1, known);
    struct step s = {.mean_decay = (float)idle.mean, .square_decay = (float)idle.square};
    s.in = gradient_of(f, i, &s.scale, sum);
    s.decay = (float)(exp(f->log_decay - f->charged[id]) * f->decay);
    s.size = (float)(-f->lr / (1 - count.mean)), s.correction = (float)sqrt(1 - count.square);
    s.reciprocal = 1 / s.correction;
    s.weight = (float)(1 - f->beta1), s.beta2 = (float)f->beta2, s.rest = (float)(1 - f->beta2), s.eps = (float)f->eps;
    s.table_bits = row_bits(id, f->table_key), s.mean_bits = row_bits(id, f->mean_key);
    f->clock[id] = (int32_t)now, f->charged[id] = f->log_decay_after;
    return s;
}

/* A line of each at a time, between vectors of arithmetic: asked for all at once, they would wait for each other. Into the
   second cache: the nearest has few places for lines that are under way. */
PREFETCHING prefetch(const struct row_adamw *f, const float *source, int64_t at, int64_t narrow) {
    int64_t wide = narrow ? 2 : 4;
    __builtin_prefetch(source);
    __builtin_prefetch(f->square + at, 0, 1);
    __builtin_prefetch((char *)f->table + at * wide, 0, 1);
    __builtin_prefetch((char *)f->mean + at * wide, 0, 1);
}

INLINE void update_numbers(const struct row_adamw *f, const struct step *s, int64_t at, int64_t j, int64_t n,
                           int64_t narrow) {
    vec g = load_numbers(s->in, j, n, 0), p = load_numbers(f->table, at + j, n, narrow);
    vec m = load_numbers(f->mean, at + j, n, narrow), v = load_numbers(f->square, at + j, n, 0);
    update(s, rounded(g * s->scale), &p, &m, &v);
    store_numbers(f->square, at + j, v, n, 0, 0, 0);
    store_numbers(f->table, at + j, p, n, narrow, s->table_bits, j);
    store_numbers(f->mean, at + j, m, n, narrow, s->mean_bits, j);
}

INLINE void update_rows(const struct row_adamw *f, int64_t begin, int64_t end, int64_t narrow, float *sum) {
    struct powers known[POWERS] = {0};
    for (int64_t i = begin; i < end; i++) {
        struct step s = step_of(f, i, sum, known);
        int64_t next = i + 1 < end ? i + 1 : i, at = f->ids[i] * f->d, later = f->ids[next] * f->d, j = 0;
        const float *source = source_of(f, next);
        for (; j + WIDTH <= f->d; j += WIDTH) {
            if (j % (LINE / 4) == 0)
                prefetch(f, source + j, later + j, narrow);
            update_numbers(f, &s, at, j, WIDTH, narrow);
        }
        if (j < f->d)
            update_numbers(f, &s, at, j, f->d - j, narrow);
    }
}

/* n codes of a row, the rest 0. */
INLINE vec load_codes(const void *from, int64_t at, int64_t n, int64_t format) {
    int8_t codes[WIDTH] = {0};
    memcpy(codes, (const int8_t *)from + at, n);
    return format == INT8 ? load_int8(codes) : load_float8((const uint8_t *)codes);
}

/* The greatest whole numbers that are not above these, of at most 2^16. */
static inline ivec floors(vec x) {
    ivec whole = __builtin_convertvector(x, ivec);
    return whole + (__builtin_convertvector(whole, vec) > x);
}

static inline vec sizes(vec x) {
    ivec bits;
    memcpy(&bits, &x, sizeof x);
    bits &= INT32_MAX;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Numbers that codes reach, as one of the two codes beside each: `stochastic_int8` and `stochastic_float8` of
   ops/rounding.py. */
INLINE ivec code_of(vec x, uvec noise, int64_t format) {
    ivec wrong = x != x;
    vec part = __builtin_convertvector((ivec)(noise & 0xffff), vec) * 0x1p-16f, size = sizes(x);
    if (format == INT8)
        return floors(choose(wrong, (vec){0}, x + part)) & ~wrong;
    ivec number, bits, small = floors(choose(size < 0x1p-6f, size, (vec){0}) * 512 + part);
    memcpy(&number, &size, sizeof size), memcpy(&bits, &x, sizeof x);
    number = ((number + (ivec)(noise & 0xfffff)) >> 20) - (120 << 3);
    ivec is_small = size < 0x1p-6f;
    return ((small & is_small) | (number & ~is_small & ~wrong) | (wrong & 0x7f)) | (bits >> 24 & 0x80);
}

/* The scale under which numbers up to `most` have codes: the one there is while it is not four times too great. */
static inline float fitting_scale(float most, float scale, float largest) {
    int exponent;
    if ((most <= largest * scale && most > largest / 4 * scale) || most == 0)
        return scale;
    frexpf(most / largest, &exponent);
    return most < __builtin_inff() ? ldexpf(1, exponent < -126 ? -126 : exponent) : __builtin_nanf("");
}

/* Numbers j..j+n-1 of a row of codes, updated, to numbers[d], which wait for their scale; their sizes. */
INLINE vec updated_numbers(const struct row_adamw *f, const struct step *s, int64_t at, float scale, int64_t j, int64_t n,
                           int64_t format, float *numbers) {
    vec g = load_numbers(s->in, j, n, 0), p = rounded(load_codes(f->table, at + j, n, format) * scale);
    vec m = load_numbers(f->mean, at + j, n, 1), v = load_numbers(f->square, at + j, n, 0);
    update(s, rounded(g * s->scale), &p, &m, &v);
    store_numbers(f->square, at + j, v, n, 0, 0, 0);
    store_numbers(f->mean, at + j, m, n, 1, s->mean_bits, j);
    store(numbers + j, (vec){0});
    store_numbers(numbers, j, p, n, 0, 0, 0);
    return sizes(load(numbers + j));
}

INLINE void store_codes(const struct row_adamw *f, int64_t at, vec x, float largest, int64_t j, int64_t n,
                        uint32_t bits, int64_t format) {
    x = choose(x > largest, every(largest), choose(x < -largest, every(-largest), x));
    sbyte_vec codes = __builtin_convertvector(code_of(x, noise_from(bits, j), format), sbyte_vec);
    memcpy((int8_t *)f->table + at + j, &codes, n);
}

/* The greater of each; what is no number stays. */
static inline vec more(vec most, vec size) { return choose(most >= size, most, choose(most != most, most, size)); }

static inline float most_of(vec most) {
    float each[WIDTH], greatest = 0;
    store(each, most);
    for (int i = 0; i < WIDTH; i++)
        greatest = greatest >= each[i] || greatest != greatest ? greatest : each[i];
    return greatest;
}

/* A row of codes. */
INLINE void update_codes(const struct row_adamw *f, const struct step *s, int64_t id, float *numbers, int64_t format) {
    int64_t at = id * f->d, j = 0;
    float scale = f->row_scale[id], largest = format == INT8 ? 127 : 448;
    vec most = {0};
    for (; j + WIDTH <= f->d; j += WIDTH)
        most = more(most, updated_numbers(f, s, at, scale, j, WIDTH, format, numbers));
    if (j < f->d)
        most = more(most, updated_numbers(f, s, at, scale, j, f->d - j, format, numbers));
    scale = f->row_scale[id] = fitting_scale(most_of(most), scale, largest);
    for (j = 0; j + WIDTH <= f->d; j += WIDTH)
        store_codes(f, at, load(numbers + j) / scale, largest, j, WIDTH, s->table_bits, format);
    if (j < f->d)
        store_codes(f, at, load(numbers + j) / scale, largest, j, f->d - j, s->table_bits, format);
}

INLINE void update_coded_rows(const struct row_adamw *f, int64_t begin, int64_t end, int64_t format, float *sum) {
    struct powers known[POWERS] = {0};
    float *numbers = sum + f->d + 1;
    for (int64_t i = begin; i < end; i++) {
        struct step s = step_of(f, i, sum, known);
        int64_t next = i + 1 < end ? i + 1 : i, later = f->ids[next] * f->d;
        for (int64_t j = 0; j < f->d; j += LINE / 4) {
            if (j % LINE == 0)
                __builtin_prefetch((char *)f->table + later + j, 0, 1);
            __builtin_prefetch((char *)f->mean + 2 * (later + j), 0, 1);
            __builtin_prefetch(f->square + later + j, 0, 1);
        }
        update_codes(f, &s, f->ids[i], numbers, format);
    }
}

/* Rows ids[begin]..ids[end - 1]. */
KERNEL(row_adamw)(const void *fields, int64_t begin, int64_t end) {
    const struct row_adamw *f = fields;
    float *sum = malloc((2 * f->d + 1 + WIDTH) * sizeof *sum);
    require_memory(sum != NULL);
    if (f->format == FLOAT32)
        update_rows(f, begin, end, 0, sum);
    else if (f->format == BFLOAT16)
        update_rows(f, begin, end, 1, sum);
    else if (f->format == INT8)
        update_coded_rows(f, begin, end, INT8, sum);
    else
        update_coded_rows(f, begin, end, FLOAT8, sum);
    free(sum);
}
