/* Gradients of the scores that `product_key.c` chose: k rows for each query and side. */

#include "vector.h"

struct gradient {
    const float *factor; /* keys [2, g, n, half] for the queries' gradient, queries [t, h, 2, half] for the keys' */
    const int64_t *ids;  /* [t, h, k] */
    const float *grad;   /* [t, h, k] of the scores */
    float *out;          /* the other one's shape */
    int64_t t, h, g, n, half, k;
};

static inline int64_t key_on(const struct gradient *f, int side, int64_t id) { return side ? id % f->n : id / f->n; }

/* Item: a token. */
KERNEL(product_key_query_gradient)(const void *fields, int64_t begin, int64_t end) {
    const struct gradient *f = fields;
    for (int64_t row = begin * f->h * 2; row < end * f->h * 2; row++) {
        int64_t side = row % 2, th = row / 2, group = f->g == 1 ? 0 : th % f->h;
        const float *keys = f->factor + (side * f->g + group) * f->n * f->half;
        float *out = f->out + row * f->half;
        memset(out, 0, f->half * sizeof *out);
        for (int64_t j = th * f->k; j < (th + 1) * f->k; j++)
            add_float32(out, keys + key_on(f, side, f->ids[j]) * f->half, f->grad[j], f->half);
    }
}

#define COLUMNS 64

/* Item: COLUMNS columns of the keys of one side and group; tokens are added in order. */
KERNEL(product_key_key_gradient)(const void *fields, int64_t begin, int64_t end) {
    const struct gradient *f = fields;
    int64_t parts = (f->half + COLUMNS - 1) / COLUMNS;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % parts * COLUMNS, side = item / parts / f->g, group = item / parts % f->g;
        int64_t width = f->half - first < COLUMNS ? f->half - first : COLUMNS;
        float *out = f->out + item / parts * f->n * f->half + first;
        for (int64_t i = 0; i < f->n; i++)
            memset(out + i * f->half, 0, width * sizeof *out);
        for (int64_t th = f->g == 1 ? 0 : group; th < f->t * f->h; th += f->g == 1 ? 1 : f->h) {
            const float *query = f->factor + (th * 2 + side) * f->half + first;
            for (int64_t j = th * f->k; j < (th + 1) * f->k; j++)
                add_float32(out + key_on(f, side, f->ids[j]) * f->half, query, f->grad[j], width);
        }
    }
}
