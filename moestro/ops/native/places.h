/* Rows of a table's gradient: each is the sum of scale * in over the places of one id. */

#ifndef MOESTRO_PLACES_H
#define MOESTRO_PLACES_H

#include "vector.h"

/* y = the sum over the places order[first]..order[last - 1] of scale * the row of in, [t, d]; token says which row, in
   the order of `order`; first < last. */
static inline void sum_places(const float *in, const int64_t *token, const float *scale, const int64_t *order,
                              int64_t first, int64_t last, int64_t d, float *y) {
    const float *x = in + token[first] * d;
    int64_t i = 0;
    for (; i + WIDTH <= d; i += WIDTH)
        store(y + i, load(x + i) * scale[order[first]]);
    for (; i < d; i++)
        y[i] = x[i] * scale[order[first]];
    for (int64_t at = first + 1; at < last; at++)
        add_float32(y, in + token[at] * d, scale[order[at]], d);
}

#endif
