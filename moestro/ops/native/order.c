/* What routers sort: the largest numbers of every row, and rows by their experts. Both as a stable sort orders them. */

#include "vector.h"

struct order {
    const float *values;   /* [rows, columns] */
    const int64_t *expert; /* [n] */
    int64_t *index;        /* [rows, k]: columns of the largest numbers; or [n]: rows in the order of their experts */
    int64_t *bounds;       /* [experts + 1]: where every expert's rows begin */
    int64_t columns, k, n, experts;
};

/* What is not a number comes before all numbers. */
static inline int comes_before(float a, float b) { return a > b || (a != a && b == b); }

/* The columns of the k largest numbers of a row, largest first, of equal ones the first: items are rows. */
KERNEL(largest_of_rows)(const void *fields, int64_t begin, int64_t end) {
    const struct order *f = fields;
    for (int64_t row = begin; row < end; row++) {
        const float *values = f->values + row * f->columns;
        int64_t *best = f->index + row * f->k, count = 0;
        for (int64_t column = 0; column < f->columns; column++) {
            if (count == f->k && !comes_before(values[column], values[best[count - 1]]))
                continue;
            int64_t place = count < f->k ? count++ : count - 1;
            for (; place && comes_before(values[column], values[best[place - 1]]); place--)
                best[place] = best[place - 1];
            best[place] = column;
        }
    }
}

/* Rows in the order of their experts, and the bounds of these: one item. Where some row's expert is none of them,
   nothing is ordered and the last bound is another number than that of the rows. */
KERNEL(order_by_expert)(const void *fields, int64_t begin, int64_t end) {
    const struct order *f = fields;
    if (begin >= end)
        return;
    int64_t *next = f->bounds;
    memset(next, 0, (f->experts + 1) * sizeof *next);
    for (int64_t n = 0; n < f->n; n++) {
        if (f->expert[n] < 0 || f->expert[n] >= f->experts) {
            f->bounds[f->experts] = -1;
            return;
        }
        next[f->expert[n] + 1]++;
    }
    for (int64_t e = 0; e < f->experts; e++)
        next[e + 1] += next[e];
    for (int64_t n = 0; n < f->n; n++)
        f->index[next[f->expert[n]]++] = n;
    for (int64_t e = f->experts; e > 0; e--)
        next[e] = next[e - 1];
    next[0] = 0;
}
