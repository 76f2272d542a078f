/* silu(gate) * up and its backward pass, each in one pass over the rows, in float32 whatever the rows hold. */

#include "vector.h"

struct glu {
    const void *z;       /* [n, 2w]: gate, up; all rows float32, or bfloat16 where narrow */
    const void *dhidden; /* [n, w] (backward) */
    const void *weight;  /* [n] (backward) */
    void *dz;            /* [n, 2w] (backward) */
    void *out;           /* [n, w]: hidden, or backward weight * hidden */
    void *dweight;       /* [n] (backward) */
    int64_t width, narrow;
};

static inline vec sigmoid(vec z) { return 1.0f / (1.0f + exponential(-z)); }

#define GLU(name, type, load_row, store_row)                                                                           \
    static inline void name##_piece(const type *gate, const type *up, type *out) {                                     \
        vec g = load_row(gate);                                                                                        \
        store_row(out, g * sigmoid(g) * load_row(up));                                                                 \
    }                                                                                                                  \
                                                                                                                       \
    static inline vec name##_back(const type *gate, const type *up, const type *dhidden, float weight, type *dgate,    \
                                  type *dup, type *out) {                                                              \
        vec g = load_row(gate), u = load_row(up), dh = load_row(dhidden), s = sigmoid(g);                              \
        vec act = g * s, hidden = act * u, scaled = dh * weight;                                                       \
        store_row(out, hidden * weight);                                                                               \
        store_row(dup, scaled * act);                                                                                  \
        store_row(dgate, scaled * u * (s * (1.0f + g * (1.0f - s))));                                                  \
        return dh * hidden;                                                                                            \
    }                                                                                                                  \
                                                                                                                       \
    static void name(const struct glu *f, int64_t row) {                                                               \
        int64_t w = f->width, i = 0;                                                                                   \
        const type *gate = (const type *)f->z + row * 2 * w, *up = gate + w;                                           \
        type *out = (type *)f->out + row * w;                                                                          \
        for (; i + WIDTH <= w; i += WIDTH)                                                                             \
            name##_piece(gate + i, up + i, out + i);                                                                   \
        if (i < w) {                                                                                                   \
            type rest[3][WIDTH] = {{0}};                                                                               \
            memcpy(rest[0], gate + i, (w - i) * sizeof(type));                                                         \
            memcpy(rest[1], up + i, (w - i) * sizeof(type));                                                           \
            name##_piece(rest[0], rest[1], rest[2]);                                                                   \
            memcpy(out + i, rest[2], (w - i) * sizeof(type));                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static float name##_backward(const struct glu *f, int64_t row, float weight) {                                     \
        int64_t w = f->width, i = 0;                                                                                   \
        const type *gate = (const type *)f->z + row * 2 * w, *up = gate + w;                                           \
        const type *dhidden = (const type *)f->dhidden + row * w;                                                      \
        type *dgate = (type *)f->dz + row * 2 * w, *dup = dgate + w, *out = (type *)f->out + row * w;                  \
        vec dot = {0};                                                                                                 \
        for (; i + WIDTH <= w; i += WIDTH)                                                                             \
            dot += name##_back(gate + i, up + i, dhidden + i, weight, dgate + i, dup + i, out + i);                    \
        if (i < w) {                                                                                                   \
            int64_t bytes = (w - i) * sizeof(type);                                                                    \
            type rest[6][WIDTH] = {{0}};                                                                               \
            memcpy(rest[0], gate + i, bytes);                                                                          \
            memcpy(rest[1], up + i, bytes);                                                                            \
            memcpy(rest[2], dhidden + i, bytes);                                                                       \
            dot += name##_back(rest[0], rest[1], rest[2], weight, rest[3], rest[4], rest[5]);                          \
            memcpy(dgate + i, rest[3], bytes);                                                                         \
            memcpy(dup + i, rest[4], bytes);                                                                           \
            memcpy(out + i, rest[5], bytes);                                                                           \
        }                                                                                                              \
        return sum(dot);                                                                                               \
    }

GLU(glu_float32, float, load, store)
GLU(glu_bfloat16, uint16_t, load_bfloat16, store_bfloat16)

/* out[n] = silu(gate[n]) * up[n], for rows begin..end-1. */
KERNEL(swiglu)(const void *fields, int64_t begin, int64_t end) {
    const struct glu *f = fields;
    for (int64_t row = begin; row < end; row++)
        if (f->narrow)
            glu_bfloat16(f, row);
        else
            glu_float32(f, row);
}

static inline uint16_t narrowed(float value) {
    uint16_t out[WIDTH];
    store_bfloat16(out, (vec){0} + value);
    return out[0];
}

/* Backward through weight * hidden: dz, out = weight * hidden, dweight = <dhidden, hidden>, for rows begin..end-1. */
KERNEL(swiglu_backward)(const void *fields, int64_t begin, int64_t end) {
    const struct glu *f = fields;
    for (int64_t row = begin; row < end; row++)
        if (f->narrow) {
            float weight = widened(((const uint16_t *)f->weight)[row]);
            ((uint16_t *)f->dweight)[row] = narrowed(glu_bfloat16_backward(f, row, weight));
        } else
            ((float *)f->dweight)[row] = glu_float32_backward(f, row, ((const float *)f->weight)[row]);
}
