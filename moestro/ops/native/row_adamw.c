/* AdamW on some rows of a table: gradient row, weights and both moments are read once and written once. */

#include <math.h>
#include <stdlib.h>

#include "places.h"

#define LINE 64

struct row_adamw {
    void *table;   /* [e, d] float32, or bfloat16 where narrow */
    void *mean;    /* [e, d] likewise */
    float *square; /* [e, d] */
    int32_t *clock;  /* [e] the steps that touched a row; the last step that did where moments do not wait */
    double *charged; /* [e] the logarithm of the decay that a row has had */
    const int64_t *ids;  /* [n] */
    const float *values; /* [n, d]; NULL: row i is the sum of scale * in over the places from starts[i] */
    const int64_t *order, *starts, *token; /* as in table_rows.c */
    const float *in, *scale;
    int64_t d, narrow, table_key, mean_key, number, moments_wait;
    double beta1, beta2, eps, lr, decay, log_decay, log_decay_after;
};

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

/* Into float32 as they are, into bfloat16 rounded stochastically. */
static inline void store_numbers(void *to, int64_t at, vec v, int64_t n, int64_t narrow, uint32_t bits, int64_t column) {
    if (!narrow) {
        memcpy((float *)to + at, &v, n * sizeof(float));
        return;
    }
    uvec number, columns;
    ivec wrong = v != v;
    memcpy(&number, &v, sizeof v);
    memcpy(&columns, FIRST_COLUMNS, sizeof columns);
    columns += (uint32_t)column;
    number = (number + (mixed_each(bits + columns * 0x9e3779b9u) & 0xffff)) >> 16;
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

/* A line of each at a time, between vectors of arithmetic: asked for all at once, they would wait for each other. */
PREFETCHING prefetch(const struct row_adamw *f, const float *source, int64_t at, int64_t narrow) {
    int64_t wide = narrow ? 2 : 4;
    __builtin_prefetch(source);
    __builtin_prefetch(f->square + at);
    __builtin_prefetch((char *)f->table + at * wide);
    __builtin_prefetch((char *)f->mean + at * wide);
}

static inline __attribute__((always_inline)) void update_numbers(const struct row_adamw *f, const struct step *s,
                                                                 int64_t at, int64_t j, int64_t n, int64_t narrow) {
    vec g = load_numbers(s->in, j, n, 0), p = load_numbers(f->table, at + j, n, narrow);
    vec m = load_numbers(f->mean, at + j, n, narrow), v = load_numbers(f->square, at + j, n, 0);
    update(s, rounded(g * s->scale), &p, &m, &v);
    store_numbers(f->square, at + j, v, n, 0, 0, 0);
    store_numbers(f->table, at + j, p, n, narrow, s->table_bits, j);
    store_numbers(f->mean, at + j, m, n, narrow, s->mean_bits, j);
}

static inline __attribute__((always_inline)) void update_rows(const struct row_adamw *f, int64_t begin, int64_t end,
                                                              int64_t narrow, float *sum) {
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

/* Rows ids[begin]..ids[end - 1]. */
KERNEL(row_adamw)(const void *fields, int64_t begin, int64_t end) {
    const struct row_adamw *f = fields;
    float *sum = malloc((f->d + 1) * sizeof *sum);
    if (!sum)
        abort();
    if (f->narrow)
        update_rows(f, begin, end, 1, sum);
    else
        update_rows(f, begin, end, 0, sum);
    free(sum);
}
