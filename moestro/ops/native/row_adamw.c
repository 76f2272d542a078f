/* AdamW on some rows of a table: gradient row, weights and both moments are read once and written once. */

#include "vector.h"

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

#define BLOCK 1024
#define AHEAD 2
#define LINE 64

struct row_adamw {
    void *table;   /* [e, d] float32, or bfloat16 where narrow */
    void *mean;    /* [e, d] likewise */
    float *square; /* [e, d] */
    const int64_t *ids;  /* [n] */
    const float *values; /* [n, d]; NULL: row i is the sum of scale * in over the places from starts[i] */
    const int64_t *order, *starts, *token; /* as in table_rows.c */
    const float *in, *scale;
    const float *decay, *size, *correction; /* [n] */
    const float *mean_decay, *square_decay; /* [n], or NULL: 1 */
    int64_t d, narrow, table_key, mean_key;
    double beta1, beta2, eps;
};

/* lowbias32: the bits of ops/rounding.py. */
static inline uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

static inline uint32_t row_bits(int64_t id, int64_t key) {
    return mixed(mixed((uint32_t)id ^ (uint32_t)key) + (uint32_t)((uint64_t)id >> 32));
}

static inline void load_numbers(float *restrict to, const void *from, int64_t at, int64_t n, int64_t narrow) {
    if (!narrow)
        memcpy(to, (const float *)from + at, n * sizeof *to);
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = widened(((const uint16_t *)from)[at + i]);
}

/* Into float32 as they are, into bfloat16 rounded stochastically. */
static inline void store_numbers(void *to, int64_t at, const float *restrict from, int64_t n, int64_t narrow,
                                 uint32_t bits, int64_t column) {
    if (!narrow) {
        memcpy((float *)to + at, from, n * sizeof *from);
        return;
    }
    uint16_t *restrict out = (uint16_t *)to + at;
    for (int64_t i = 0; i < n; i++) {
        uint32_t number;
        memcpy(&number, from + i, sizeof number);
        uint32_t rounded = (number + (mixed(bits + (uint32_t)(column + i) * 0x9e3779b9u) & 0xffff)) >> 16;
        out[i] = (uint16_t)(from[i] == from[i] ? rounded : 0x7fc0); /* a sum could carry into the sign */
    }
}

/* Numbers a..a+n-1 of gradient row i. */
static inline void gradient_of(const struct row_adamw *f, int64_t i, int64_t a, int64_t n, float *restrict g) {
    if (f->values) {
        memcpy(g, f->values + i * f->d + a, n * sizeof *g);
        return;
    }
    for (int64_t at = f->starts[i]; at < f->starts[i + 1]; at++) {
        const float *restrict x = f->in + f->token[at] * f->d + a;
        float scale = f->scale[f->order[at]];
        if (at == f->starts[i])
            for (int64_t j = 0; j < n; j++)
                g[j] = x[j] * scale;
        else
            for (int64_t j = 0; j < n; j++)
                g[j] = MADD(x[j], scale, g[j]);
    }
}

/* The operations of torch's kernels, in their order. What stands in a loop of its own is rounded before it is used: in
   one expression, compilers would join a product and a sum where torch does not. */
static inline void update(const struct row_adamw *f, int64_t i, int64_t n, const float *restrict g, float *restrict p,
                          float *restrict m, float *restrict v) {
    const float decay = f->decay[i], size = f->size[i], correction = f->correction[i], eps = (float)f->eps;
    const float weight = (float)(1 - f->beta1), beta2 = (float)f->beta2, rest = (float)(1 - f->beta2);
    if (f->mean_decay)
        for (int64_t j = 0; j < n; j++) {
            m[j] *= f->mean_decay[i];
            v[j] *= f->square_decay[i];
        }
    for (int64_t j = 0; j < n; j++)
        p[j] *= decay;
    /* torch's lerp begins at the nearer end */
    if (weight < 0.5f)
        for (int64_t j = 0; j < n; j++)
            m[j] = MADD(weight, g[j] - m[j], m[j]);
    else
        for (int64_t j = 0; j < n; j++)
            m[j] = MADD(weight - 1, g[j] - m[j], g[j]);
    for (int64_t j = 0; j < n; j++) {
        float square = MADD(rest * g[j], g[j], v[j] * beta2);
        v[j] = square;
        p[j] += size * m[j] / (__builtin_sqrtf(square) / correction + eps);
    }
}

PREFETCHING prefetch_rows(const struct row_adamw *f, int64_t i) {
    int64_t at = f->ids[i] * f->d, wide = f->narrow ? 2 : 4;
    for (int64_t byte = 0; byte < f->d * 4; byte += LINE) {
        __builtin_prefetch((char *)(f->square + at) + byte, 1);
        if (byte < f->d * wide) {
            __builtin_prefetch((char *)f->table + at * wide + byte, 1);
            __builtin_prefetch((char *)f->mean + at * wide + byte, 1);
        }
    }
}

/* Rows ids[begin]..ids[end - 1]. */
KERNEL(row_adamw)(const void *fields, int64_t begin, int64_t end) {
    const struct row_adamw *f = fields;
    float g[BLOCK], p[BLOCK], m[BLOCK];
    for (int64_t i = begin; i < end; i++) {
        if (i + AHEAD < end)
            prefetch_rows(f, i + AHEAD);
        uint32_t table_bits = row_bits(f->ids[i], f->table_key), mean_bits = row_bits(f->ids[i], f->mean_key);
        for (int64_t a = 0; a < f->d; a += BLOCK) {
            int64_t n = f->d - a < BLOCK ? f->d - a : BLOCK, at = f->ids[i] * f->d + a;
            gradient_of(f, i, a, n, g);
            load_numbers(p, f->table, at, n, f->narrow);
            load_numbers(m, f->mean, at, n, f->narrow);
            update(f, i, n, g, p, m, f->square + at);
            store_numbers(f->table, at, p, n, f->narrow, table_bits, a);
            store_numbers(f->mean, at, m, n, f->narrow, mean_bits, a);
        }
    }
}
