/* Gated experts on few rows: every weight is read from memory once, in the order in which it lies there.

   y[t] = sum over the rows r of token t of weight[r] * sum over units j of expert e of
          silu(gate_j . x[t]) * (up_j . x[t]) * out_j,   computed in float32.

   What out_j is lies in one row for each unit, or, in matrices stacked by expert, in one row for each column of y. */

#include "vector.h"

#define ROWS 4    /* that share the reading of a unit's weights */
#define COLUMNS 64 /* of a sum over rows */
#define AHEAD 4096 /* bytes: processors do not look beyond a page by themselves */

struct few {
    const void *w_in;     /* [2 units, d]: gate rows of an expert, its up rows; float32, or bfloat16 where narrow */
    const void *w_out;    /* [units, d], or where stacked [e, d, width] */
    const float *x;       /* [t, d] */
    const float *weight;  /* [r] */
    const int64_t *token; /* [r], rows in the order of their experts */
    const int64_t *met;   /* [m, 4]: first row, last row + 1, first unit, last unit + 1 of every expert that has rows */
    float *hidden;        /* where stacked, [r, width] */
    float *part;          /* [r, chunks, d]: what the units of one chunk add to a row; where stacked [r, 1, d] */
    float *y;             /* [t, d] */
    int64_t d, r, t, chunks, stacked, narrow;
};

/* All rows of an expert, ROWS at a time, then two, then one. */
#define BY_ROWS(name, some)                                                                                            \
    static void name(const struct few *f, const int64_t *met, int64_t chunk) {                                         \
        int64_t row = met[0];                                                                                          \
        for (; row + ROWS <= met[1]; row += ROWS)                                                                      \
            some(f, met, chunk, row, ROWS);                                                                            \
        for (; row + 2 <= met[1]; row += 2)                                                                            \
            some(f, met, chunk, row, 2);                                                                               \
        if (row < met[1])                                                                                              \
            some(f, met, chunk, row, 1);                                                                               \
    }

/* Products of two rows of a matrix with `count` rows of x: two sums each, because one would wait for itself. */
#define FEW(name, type, load_row, one)                                                                                 \
    static inline __attribute__((always_inline)) void name##_dots(const type *left, const type *right, int64_t length, \
                                                                  const float *const *x, float *of_left,               \
                                                                  float *of_right, const int count) {                  \
        vec l[2][ROWS] = {{{0}}}, r[2][ROWS] = {{{0}}};                                                                \
        float left_rest[ROWS] = {0}, right_rest[ROWS] = {0};                                                           \
        int64_t i = 0;                                                                                                 \
        for (; i + 2 * WIDTH <= length; i += 2 * WIDTH)                                                                \
            for (int half = 0; half < 2; half++) {                                                                     \
                int64_t at = i + half * WIDTH;                                                                         \
                vec on_left = load_row(left + at), on_right = load_row(right + at);                                    \
                __builtin_prefetch(left + at + AHEAD / sizeof(type));                                                  \
                __builtin_prefetch(right + at + AHEAD / sizeof(type));                                                 \
                for (int n = 0; n < count; n++) {                                                                      \
                    vec value = load(x[n] + at);                                                                       \
                    l[half][n] += on_left * value;                                                                     \
                    r[half][n] += on_right * value;                                                                    \
                }                                                                                                      \
            }                                                                                                          \
        for (; i < length; i++)                                                                                        \
            for (int n = 0; n < count; n++) {                                                                          \
                left_rest[n] += one(left[i]) * x[n][i];                                                                \
                right_rest[n] += one(right[i]) * x[n][i];                                                              \
            }                                                                                                          \
        for (int n = 0; n < count; n++) {                                                                              \
            of_left[n] = sum(l[0][n] + l[1][n]) + left_rest[n];                                                        \
            of_right[n] = sum(r[0][n] + r[1][n]) + right_rest[n];                                                      \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline __attribute__((always_inline)) void name##_hidden(const type *gate, const type *up, int64_t d,       \
                                                                    const float *const *x, float *hidden,              \
                                                                    const int count) {                                 \
        float z[ROWS];                                                                                                 \
        name##_dots(gate, up, d, x, z, hidden, count);                                                                 \
        for (int r = 0; r < count; r++) {                                                                              \
            vec denominator = 1.0f + exponential((vec){0} - z[r]);                                                     \
            hidden[r] *= z[r] / denominator[0];                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline __attribute__((always_inline)) void name##_add(const type *out, int64_t d, const float *hidden,      \
                                                                 float *const *part, const int count) {                \
        int64_t i = 0;                                                                                                 \
        for (; i + WIDTH <= d; i += WIDTH) {                                                                           \
            vec of_out = load_row(out + i);                                                                            \
            __builtin_prefetch(out + i + AHEAD / sizeof(type));                                                        \
            for (int r = 0; r < count; r++)                                                                            \
                store(part[r] + i, load(part[r] + i) + of_out * hidden[r]);                                            \
        }                                                                                                              \
        for (; i < d; i++)                                                                                             \
            for (int r = 0; r < count; r++)                                                                            \
                part[r][i] += one(out[i]) * hidden[r];                                                                 \
    }                                                                                                                  \
                                                                                                                       \
    /* A chunk of an expert's units for rows first..first+count-1. */                                                  \
    static inline __attribute__((always_inline)) void name##_units(const struct few *f, const int64_t *met,            \
                                                                   int64_t chunk, int64_t first, const int count) {    \
        int64_t width = met[3] - met[2], d = f->d;                                                                     \
        const type *gate = (const type *)f->w_in + 2 * met[2] * d, *up = gate + width * d;                             \
        const type *out = (const type *)f->w_out + met[2] * d;                                                         \
        const float *x[ROWS];                                                                                          \
        float *part[ROWS], hidden[ROWS];                                                                               \
        for (int r = 0; r < count; r++) {                                                                              \
            x[r] = f->x + f->token[first + r] * d;                                                                     \
            part[r] = f->part + ((first + r) * f->chunks + chunk) * d;                                                 \
            if (!f->stacked)                                                                                           \
                memset(part[r], 0, d * sizeof(float));                                                                 \
        }                                                                                                              \
        for (int64_t j = width * chunk / f->chunks; j < width * (chunk + 1) / f->chunks; j++) {                        \
            name##_hidden(gate + j * d, up + j * d, d, x, hidden, count);                                              \
            if (!f->stacked)                                                                                           \
                name##_add(out + j * d, d, hidden, part, count);                                                       \
            for (int r = 0; f->stacked && r < count; r++)                                                              \
                f->hidden[(first + r) * width + j] = hidden[r];                                                        \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* A chunk of the columns of a stacked expert's output for rows first..first+count-1. */                           \
    static inline __attribute__((always_inline)) void name##_columns(const struct few *f, const int64_t *met,          \
                                                                     int64_t chunk, int64_t first, const int count) {  \
        int64_t width = met[3] - met[2], stop = f->d * (chunk + 1) / f->chunks;                                        \
        const type *out = (const type *)f->w_out + met[2] * f->d;                                                      \
        const float *hidden[ROWS];                                                                                     \
        float one_column[ROWS], next_column[ROWS];                                                                     \
        for (int r = 0; r < count; r++)                                                                                \
            hidden[r] = f->hidden + (first + r) * width;                                                               \
        for (int64_t c = f->d * chunk / f->chunks; c < stop; c += 2) {                                                 \
            int64_t next = c + 1 < stop ? c + 1 : c;                                                                   \
            name##_dots(out + c * width, out + next * width, width, hidden, one_column, next_column, count);           \
            for (int r = 0; r < count; r++) {                                                                          \
                f->part[(first + r) * f->d + c] = one_column[r];                                                       \
                f->part[(first + r) * f->d + next] = next_column[r];                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    BY_ROWS(name##_all_units, name##_units)                                                                            \
    BY_ROWS(name##_all_columns, name##_columns)

FEW(few_float32, float, load, AS_IS)
FEW(few_bfloat16, uint16_t, load_bfloat16, widened)

/* What the chunks of units begin..end-1, counted over the experts that have rows, add; where stacked, hidden of them. */
KERNEL(few_rows)(const void *fields, int64_t begin, int64_t end) {
    const struct few *f = fields;
    for (int64_t item = begin; item < end; item++)
        (f->narrow ? few_bfloat16_all_units : few_float32_all_units)(f, f->met + item / f->chunks * 4, item % f->chunks);
}

/* What stacked experts add in chunks of columns begin..end-1, counted likewise. */
KERNEL(few_rows_columns)(const void *fields, int64_t begin, int64_t end) {
    const struct few *f = fields;
    for (int64_t item = begin; item < end; item++)
        (f->narrow ? few_bfloat16_all_columns
                   : few_float32_all_columns)(f, f->met + item / f->chunks * 4, item % f->chunks);
}

/* y in the blocks of columns begin..end-1: sums in the order of rows and chunks. */
KERNEL(few_rows_sum)(const void *fields, int64_t begin, int64_t end) {
    const struct few *f = fields;
    int64_t first = begin * COLUMNS, last = end * COLUMNS < f->d ? end * COLUMNS : f->d;
    for (int64_t t = 0; t < f->t; t++)
        memset(f->y + t * f->d + first, 0, (last - first) * sizeof(float));
    int64_t parts = f->stacked ? 1 : f->chunks;
    for (int64_t r = 0; r < f->r; r++)
        for (int64_t chunk = 0; chunk < parts; chunk++) {
            const float *part = f->part + (r * parts + chunk) * f->d;
            add_float32(f->y + f->token[r] * f->d + first, part + first, f->weight[r], last - first);
        }
}
