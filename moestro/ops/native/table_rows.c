/* Products with rows of a large table that are fetched by id, in float32, whatever the table holds.

   No gathered row is written anywhere: it is used while it passes. Rows wanted soon are asked of the memory ahead. */

#include <stdlib.h>

#include "places.h"

#define AHEAD 8192 /* bytes of rows that are asked for in whole */
#define FAR 16     /* rows before those: where each begins, which finds its page */
#define LINE 64

enum format { FLOAT32, BFLOAT16, INT8, FLOAT8 };

struct rows {
    const void *table;    /* [e, d] */
    const float *scale;   /* [e] a factor of every row, or NULL: 1 */
    const int64_t *ids;   /* [n] rows, token after token */
    const int64_t *place; /* NULL: k for each token; else [n], the token of each, or [t], where each token's begin */
    const float *in;      /* the other factor */
    float *out;
    int64_t n, t, k, d, format;
};

static inline int64_t bytes_of_row(const struct rows *f) {
    return f->d * (f->format == FLOAT32 ? 4 : f->format == BFLOAT16 ? 2 : 1);
}

static inline const char *row_of(const struct rows *f, int64_t id) {
    return (const char *)f->table + id * bytes_of_row(f);
}

static inline int64_t rows_ahead(const struct rows *f) { return AHEAD / (bytes_of_row(f) + 1) + 1; }

PREFETCHING prefetch_rows(const struct rows *f, int64_t pair, int64_t ahead) {
    if (pair + ahead + FAR < f->n) {
        int64_t id = f->ids[pair + ahead + FAR];
        __builtin_prefetch(row_of(f, id), 0, 1);
        if (f->scale)
            __builtin_prefetch(f->scale + id, 0, 1);
    }
    if (pair + ahead >= f->n)
        return;
    const char *row = row_of(f, f->ids[pair + ahead]);
    for (int64_t at = 0; at < bytes_of_row(f); at += LINE)
        __builtin_prefetch(row + at, 0, 1);
}

static inline float dot(const struct rows *f, const void *row, const float *x) {
    switch (f->format) {
    case FLOAT32:
        return dot_float32(row, x, f->d);
    case BFLOAT16:
        return dot_bfloat16(row, x, f->d);
    case INT8:
        return dot_int8(row, x, f->d);
    default:
        return dot_float8(row, x, f->d);
    }
}

static inline void add(const struct rows *f, float *y, const void *row, float scale) {
    switch (f->format) {
    case FLOAT32:
        return add_float32(y, row, scale, f->d);
    case BFLOAT16:
        return add_bfloat16(y, row, scale, f->d);
    case INT8:
        return add_int8(y, row, scale, f->d);
    default:
        return add_float8(y, row, scale, f->d);
    }
}

/* out[n] = table[ids[n]] . in[the token of n], for n from begin to end - 1; in is [t, d]. */
KERNEL(rows_dot)(const void *fields, int64_t begin, int64_t end) {
    const struct rows *f = fields;
    int64_t ahead = rows_ahead(f);
    int64_t token = f->place || begin >= end ? 0 : begin / f->k, rest = begin - token * f->k;
    for (int64_t pair = begin; pair < end; pair++) {
        prefetch_rows(f, pair, ahead);
        int64_t id = f->ids[pair];
        float found = dot(f, row_of(f, id), f->in + (f->place ? f->place[pair] : token) * f->d);
        f->out[pair] = f->scale ? found * f->scale[id] : found;
        if (++rest == f->k)
            token++, rest = 0;
    }
}

/* out[t] = sum over the n of token t of in[n] * table[ids[n]], for tokens begin..end-1; in is [n]. */
KERNEL(rows_sum)(const void *fields, int64_t begin, int64_t end) {
    const struct rows *f = fields;
    int64_t ahead = rows_ahead(f);
    for (int64_t t = begin; t < end; t++) {
        float *y = f->out + t * f->d;
        memset(y, 0, f->d * sizeof *y);
        int64_t first = f->place ? f->place[t] : t * f->k;
        int64_t last = !f->place ? first + f->k : t + 1 < f->t ? f->place[t + 1] : f->n;
        for (int64_t pair = first; pair < last; pair++) {
            prefetch_rows(f, pair, ahead);
            int64_t id = f->ids[pair];
            add(f, y, row_of(f, id), f->scale ? f->in[pair] * f->scale[id] : f->in[pair]);
        }
    }
}

/* The gradient of a table: each segment is a row, the sum of scale * in over the places of one id, in their order. */
struct segments {
    const int64_t *order;  /* [n] places in the order of their ids */
    const int64_t *starts; /* [n_segments + 1] */
    const int64_t *rows;   /* [n_segments] the row of out that each segment fills */
    const float *in;       /* [t, d] */
    const int64_t *token;  /* [n] the row of in, in the order of the ids */
    const float *scale;    /* [n], by place */
    float *out;
    int64_t d;
};

static inline void sum_segment(const struct segments *f, int64_t s, float *y) {
    sum_places(f->in, f->token, f->scale, f->order, f->starts[s], f->starts[s + 1], f->d, y);
}

KERNEL(segment_sums)(const void *fields, int64_t begin, int64_t end) {
    const struct segments *f = fields;
    for (int64_t s = begin; s < end; s++)
        sum_segment(f, s, f->out + f->rows[s] * f->d);
}

/* The same rows, of which only the squares of their 2-norms are wanted. */
struct squares {
    const int64_t *order, *starts, *token; /* as in struct segments, like in and scale */
    const float *in, *scale;
    const double *square; /* [t] of the 2-norms of the rows of in */
    double *out;          /* [n_segments] */
    int64_t d;
};

/* Most segments have one place, whose row is not looked at. */
KERNEL(segment_squares)(const void *fields, int64_t begin, int64_t end) {
    const struct squares *f = fields;
    float *y = malloc((f->d + 1) * sizeof *y);
    require_memory(y != NULL);
    for (int64_t s = begin; s < end; s++) {
        int64_t first = f->starts[s], last = f->starts[s + 1];
        double scale = f->scale[f->order[first]];
        if (last == first + 1)
            f->out[s] = scale * scale * f->square[f->token[first]];
        else {
            sum_places(f->in, f->token, f->scale, f->order, first, last, f->d, y);
            f->out[s] = dot_float32(y, y, f->d);
        }
    }
    free(y);
}

/* The places in the order of their ids, ties in their own order, and the segments of equal ids: a radix sort. */
struct sorting {
    const int64_t *ids; /* [n], 0 to n_ids - 1 */
    int64_t *order;     /* [n] */
    int64_t *rows;      /* [n] the id of each segment */
    int64_t *starts;    /* [n + 1] */
    int64_t *count;     /* [1] the number of segments */
    int64_t n, n_ids;
};

#define RADIX_BITS 11
#define RADIX (1 << RADIX_BITS)

/* One item: the whole. */
KERNEL(sort_ids)(const void *fields, int64_t begin, int64_t end) {
    const struct sorting *f = fields;
    /* rows is free until the end: passes go back and forth between it and order */
    int64_t *from = f->rows, *to = f->order, n = f->n;
    for (int64_t i = 0; i < n; i++)
        from[i] = i;
    for (int shift = 0; begin < end && (shift == 0 || (f->n_ids - 1) >> shift > 0); shift += RADIX_BITS) {
        int64_t next[RADIX] = {0}, before = 0;
        for (int64_t i = 0; i < n; i++)
            next[f->ids[i] >> shift & (RADIX - 1)]++;
        for (int64_t digit = 0; digit < RADIX; digit++) {
            int64_t here = next[digit];
            next[digit] = before;
            before += here;
        }
        for (int64_t i = 0; i < n; i++)
            to[next[f->ids[from[i]] >> shift & (RADIX - 1)]++] = from[i];
        int64_t *swapped = from;
        from = to, to = swapped;
    }
    if (from != f->order)
        memcpy(f->order, from, n * sizeof *from);
    int64_t segments = 0;
    for (int64_t i = 0; i < n; i++)
        if (i == 0 || f->ids[f->order[i]] != f->ids[f->order[i - 1]]) {
            f->rows[segments] = f->ids[f->order[i]];
            f->starts[segments++] = i;
        }
    f->starts[segments] = n;
    *f->count = segments;
}
