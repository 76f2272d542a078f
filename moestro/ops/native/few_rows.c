/* Gated experts on few rows: every weight is read from memory once, in the order in which it lies there.

   y[t] = sum over the rows r of token t of weight[r] * sum over units j of expert e of
          silu(gate_j . x[t]) * (up_j . x[t]) * out_j,   computed in float32. */

#include "vector.h"

#define ROWS 4    /* that share the reading of a unit's weights */
#define COLUMNS 64 /* of a sum over rows */
#define AHEAD 4096 /* bytes: processors do not look beyond a page by themselves */

struct few {
    const void *w_in;     /* [2 units, d]: gate rows of an expert, its up rows; float32, or bfloat16 where narrow */
    const void *w_out;    /* [units, d] */
    const float *x;       /* [t, d] */
    const float *weight;  /* [r] */
    const int64_t *token; /* [r], rows in the order of their experts */
    const int64_t *met;   /* [m, 4]: first row, last row + 1, first unit, last unit + 1 of every expert that has rows */
    float *part;          /* [r, chunks, d]: what the units of one chunk add to a row */
    float *y;             /* [t, d] */
    int64_t d, r, t, chunks, narrow;
};

#define FEW(name, type, load_row, one)                                                                                 \
    static inline __attribute__((always_inline)) void name##_unit(const struct few *f, const type *gate,               \
                                                                  const type *up, const type *out,                     \
                                                                  const float *const *x, float *const *part,           \
                                                                  const int count) {                                   \
        vec g[2][ROWS] = {{{0}}}, u[2][ROWS] = {{{0}}}; /* two sums each: one would wait for itself */                 \
        float gate_rest[ROWS] = {0}, up_rest[ROWS] = {0};                                                              \
        int64_t i = 0, d = f->d;                                                                                       \
        for (; i + 2 * WIDTH <= d; i += 2 * WIDTH)                                                                     \
            for (int half = 0; half < 2; half++) {                                                                     \
                int64_t at = i + half * WIDTH;                                                                         \
                vec of_gate = load_row(gate + at), of_up = load_row(up + at);                                          \
                __builtin_prefetch(gate + at + AHEAD / sizeof(type));                                                  \
                __builtin_prefetch(up + at + AHEAD / sizeof(type));                                                    \
                for (int r = 0; r < count; r++) {                                                                      \
                    vec value = load(x[r] + at);                                                                       \
                    g[half][r] += of_gate * value;                                                                     \
                    u[half][r] += of_up * value;                                                                       \
                }                                                                                                      \
            }                                                                                                          \
        for (; i < d; i++)                                                                                             \
            for (int r = 0; r < count; r++) {                                                                          \
                gate_rest[r] += one(gate[i]) * x[r][i];                                                                \
                up_rest[r] += one(up[i]) * x[r][i];                                                                    \
            }                                                                                                          \
        float hidden[ROWS];                                                                                            \
        for (int r = 0; r < count; r++) {                                                                              \
            float z = sum(g[0][r] + g[1][r]) + gate_rest[r];                                                           \
            vec denominator = 1.0f + exponential((vec){0} - z);                                                        \
            hidden[r] = z / denominator[0] * (sum(u[0][r] + u[1][r]) + up_rest[r]);                                    \
        }                                                                                                              \
        for (i = 0; i + WIDTH <= d; i += WIDTH) {                                                                      \
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
    /* Units begin..end-1 of an expert for rows first..first+count-1. */                                               \
    static inline __attribute__((always_inline)) void name##_rows(const struct few *f, const int64_t *met,             \
                                                                  int64_t chunk, int64_t first, const int count) {     \
        int64_t width = met[3] - met[2], d = f->d;                                                                     \
        const type *gate = (const type *)f->w_in + 2 * met[2] * d, *up = gate + width * d;                             \
        const type *out = (const type *)f->w_out + met[2] * d;                                                         \
        const float *x[ROWS];                                                                                          \
        float *part[ROWS];                                                                                             \
        for (int r = 0; r < count; r++) {                                                                              \
            x[r] = f->x + f->token[first + r] * d;                                                                     \
            part[r] = f->part + ((first + r) * f->chunks + chunk) * d;                                                 \
            memset(part[r], 0, d * sizeof(float));                                                                     \
        }                                                                                                              \
        for (int64_t j = width * chunk / f->chunks; j < width * (chunk + 1) / f->chunks; j++)                          \
            name##_unit(f, gate + j * d, up + j * d, out + j * d, x, part, count);                                     \
    }                                                                                                                  \
                                                                                                                       \
    static void name(const struct few *f, const int64_t *met, int64_t chunk) {                                         \
        int64_t row = met[0];                                                                                          \
        for (; row + ROWS <= met[1]; row += ROWS)                                                                      \
            name##_rows(f, met, chunk, row, ROWS);                                                                     \
        for (; row + 2 <= met[1]; row += 2)                                                                            \
            name##_rows(f, met, chunk, row, 2);                                                                        \
        if (row < met[1])                                                                                              \
            name##_rows(f, met, chunk, row, 1);                                                                        \
    }

FEW(few_float32, float, load, AS_IS)
FEW(few_bfloat16, uint16_t, load_bfloat16, widened)

/* part of the chunks begin..end-1, counted over the experts that have rows. */
KERNEL(few_rows)(const void *fields, int64_t begin, int64_t end) {
    const struct few *f = fields;
    for (int64_t item = begin; item < end; item++) {
        const int64_t *met = f->met + item / f->chunks * 4;
        if (f->narrow)
            few_bfloat16(f, met, item % f->chunks);
        else
            few_float32(f, met, item % f->chunks);
    }
}

/* y in the blocks of columns begin..end-1: sums in the order of rows and chunks. */
KERNEL(few_rows_sum)(const void *fields, int64_t begin, int64_t end) {
    const struct few *f = fields;
    int64_t first = begin * COLUMNS, last = end * COLUMNS < f->d ? end * COLUMNS : f->d;
    for (int64_t t = 0; t < f->t; t++)
        memset(f->y + t * f->d + first, 0, (last - first) * sizeof(float));
    for (int64_t r = 0; r < f->r; r++)
        for (int64_t chunk = 0; chunk < f->chunks; chunk++) {
            const float *part = f->part + (r * f->chunks + chunk) * f->d;
            add_float32(f->y + f->token[r] * f->d + first, part + first, f->weight[r], last - first);
        }
}
