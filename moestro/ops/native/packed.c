/* Products with a matrix in 8 or 4 bits, read as it is stored: w = scale * code + shift, both of a group of a row.

   The codes of a group lie in consecutive bytes: the first part of them in the lowest bits, the next in the bits above. */

#include "vector.h"

#define TOKENS 4 /* that share the work of reading codes */

struct packed {
    const uint8_t *codes; /* [o, groups, bytes] */
    const void *scale;    /* [o, groups], float32, or bfloat16 where narrow */
    const void *shift;    /* [o, groups], likewise */
    const float *x;       /* [n, groups * bytes * 8 / bits], 0 behind the last column */
    const float *sums;    /* [n, groups], of x */
    float *out;           /* [n, o] */
    int64_t n, o, groups, bytes, bits, narrow;
};

typedef uint8_t byte_vec __attribute__((vector_size(WIDTH)));

static inline ivec load_bytes(const uint8_t *from) {
    byte_vec bytes;
    memcpy(&bytes, from, sizeof bytes);
    /* in two steps: compilers take one apart, number by number */
    return __builtin_convertvector(__builtin_convertvector(bytes, half_vec), ivec);
}

static inline float number(const void *values, int64_t at, int64_t narrow) {
    return narrow ? widened(((const uint16_t *)values)[at]) : ((const float *)values)[at];
}

/* out[first .. first + count - 1, row]; bits and count are constants where this is expanded. */
static inline __attribute__((always_inline)) void products(const struct packed *f, int64_t row, int64_t first,
                                                           const int bits, const int count) {
    const int64_t group = f->bytes * 8 / bits, columns = f->groups * group;
    vec total[TOKENS] = {{0}};
    float rest[TOKENS] = {0};
    for (int64_t g = 0; g < f->groups; g++) {
        const uint8_t *codes = f->codes + (row * f->groups + g) * f->bytes;
        const float *x = f->x + first * columns + g * group;
        vec part[TOKENS] = {{0}};
        for (int64_t b = 0; b < f->bytes; b += WIDTH) {
            ivec bytes = load_bytes(codes + b);
            for (int place = 0; place < 8 / bits; place++) {
                vec code = __builtin_convertvector((bytes >> (bits * place)) & ((1 << bits) - 1), vec);
                for (int t = 0; t < count; t++)
                    part[t] += code * load(x + t * columns + place * f->bytes + b);
            }
        }
        float scale = number(f->scale, row * f->groups + g, f->narrow);
        float shift = number(f->shift, row * f->groups + g, f->narrow);
        for (int t = 0; t < count; t++) {
            total[t] += part[t] * scale;
            rest[t] += shift * f->sums[(first + t) * f->groups + g];
        }
    }
    for (int t = 0; t < count; t++)
        f->out[(first + t) * f->o + row] = sum(total[t]) + rest[t];
}

/* out[n, o] = x[n] . w[o], for rows o of the matrix from begin to end - 1. */
KERNEL(packed_linear)(const void *fields, int64_t begin, int64_t end) {
    const struct packed *f = fields;
    for (int64_t row = begin; row < end; row++) {
        int64_t first = 0;
        for (; first + TOKENS <= f->n; first += TOKENS)
            if (f->bits == 8)
                products(f, row, first, 8, TOKENS);
            else
                products(f, row, first, 4, TOKENS);
        for (; first < f->n; first++)
            if (f->bits == 8)
                products(f, row, first, 8, 1);
            else
                products(f, row, first, 4, 1);
    }
}
