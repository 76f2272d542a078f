/* The backward pass of `expert_tiles.c`. */

#ifdef __AMX_BF16__

#include "tiles.h"

static inline void store_exchanged(__m512i v[SIDE], uint16_t *to, int64_t stride) {
    exchange(v);
    for (int64_t i = 0; i < SIDE; i++)
        _mm256_storeu_si256((__m256i *)(to + i * stride), narrow_half((vec)v[i]));
}

/* dz, weight * hidden and what 16 units add to <dhidden, hidden>, of 16 slots, from dhidden / weight in c. */
static vec swiglu_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot, vec weight,
                       const float *c) {
    int64_t at = unit * e->slots + slot;
    const uint16_t *z = f->z + 2 * e->hidden + at;
    uint16_t *units = f->dz_units + 2 * e->hidden + at, *scaled = f->scaled + e->hidden + at;
    uint16_t *rows = f->dz + 2 * e->hidden + slot * 2 * e->wide + unit;
    __m512i of_gate[SIDE], of_up[SIDE];
    vec dot = {0};
    for (int64_t u = 0; u < SIDE; u++) {
        vec gate = load_bfloat16(z + u * e->slots), up = load_bfloat16(z + (e->wide + u) * e->slots);
        vec dhidden = load(c + u * SIDE), s = 1.0f / (1.0f + exponential(-gate)), act = gate * s, hidden = act * up;
        vec back = dhidden * weight, dup = back * act, dgate = back * up * (s * (1.0f + gate * (1.0f - s)));
        dot += dhidden * hidden;
        _mm256_storeu_si256((__m256i *)(scaled + u * e->slots), narrow_half(hidden * weight));
        _mm256_storeu_si256((__m256i *)(units + u * e->slots), narrow_half(dgate));
        _mm256_storeu_si256((__m256i *)(units + (e->wide + u) * e->slots), narrow_half(dup));
        of_gate[u] = (__m512i)dgate;
        of_up[u] = (__m512i)dup;
    }
    store_exchanged(of_gate, rows, 2 * e->wide);
    store_exchanged(of_up, rows + e->wide, 2 * e->wide);
    return dot;
}

/* Back through weight * (hidden W_out) and SwiGLU: items are 32 units of an expert. */
KERNEL(tile_dhidden)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t deep = UP_TO(f->d, DEEP) / DEEP;
    uint16_t *copy = scratch(2 * SIDE * deep * DEEP);
    float c[4][SIDE * SIDE] __attribute__((aligned(64)));
    use_tiles();
    for (int64_t item = begin; item < end; item++) {
        int64_t at = expert_of(f, item), unit = (item - f->items[at]) * DEEP, stride;
        const struct expert *e = f->experts + at;
        const uint16_t *one = f->w_out + (e->unit + unit) * f->d, *two = one + SIDE * f->d;
        struct soon soon = {(const char *)(one + DEEP * f->d), (const char *)(two + DEEP * f->d), 0};
        soon.lines = e->slots ? f->d / (2 * (e->slots / DEEP) * deep) + 1 : 0;
        one = whole_rows(one, e->width - unit, f->d, copy, &stride);
        two = whole_rows(two, e->width - unit - SIDE, f->d, copy + SIDE * deep * DEEP, &stride);
        for (int64_t slot = 0; slot < e->slots; slot += DEEP) {
            const uint16_t *b = f->dy_across + (e->slot + slot) / SIDE * deep * TILE;
            product(one, two, stride, b, b + deep * TILE, deep, c, &soon);
            for (int64_t half = 0; half < 2; half++) {
                int64_t here = slot + half * SIDE, rest = e->n - here;
                __mmask16 mask = rest >= SIDE ? 0xffff : rest <= 0 ? 0 : (1u << rest) - 1;
                vec weight = (vec)_mm512_maskz_loadu_ps(mask, f->weight + e->row + here);
                vec dot = swiglu_back(f, e, unit, here, weight, c[half]);
                dot += swiglu_back(f, e, unit + SIDE, here, weight, c[2 + half]);
                store(f->part + e->hidden / DEEP + unit / DEEP * e->slots + here, dot);
            }
        }
    }
    _tile_release();
    free(copy);
}

/* Gradients of the weights of 32 units: a [units, slots] times the rows b, paired along slots. */
static void gradient(const struct tiles *f, const struct expert *e, const uint16_t *a, const uint16_t *b, int64_t count,
                     uint16_t *to, float c[4][SIDE * SIDE]) {
    int64_t deep = e->slots / DEEP;
    for (int64_t column = 0; column < f->d; column += DEEP) {
        const uint16_t *left = b + column / SIDE * deep * TILE;
        __mmask32 mask = first_columns(f->d - column);
        product(a, a + SIDE * e->slots, e->slots, left, left + deep * TILE, deep, c, NULL);
        for (int64_t u = 0; u < DEEP && u < count; u++) {
            float *two = c[u / SIDE * 2] + u % SIDE * SIDE;
            uint16_t *here = to + u * f->d + column;
            /* past the cache, which would read first what is written over */
            if ((uintptr_t)here % 64 == 0 && column + DEEP <= f->d)
                _mm512_stream_si512((__m512i *)here, narrow(two, two + SIDE * SIDE));
            else
                _mm512_mask_storeu_epi16(here, mask, narrow(two, two + SIDE * SIDE));
        }
    }
}

/* dW_in = dz^T x and dW_out = (weight * hidden)^T dy, where wanted: items are 32 units of gate, up or out. */
KERNEL(tile_dweights)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    float c[4][SIDE * SIDE] __attribute__((aligned(64)));
    use_tiles();
    for (int64_t item = begin; item < end; item++) {
        int64_t at = expert_of(f, item);
        const struct expert *e = f->experts + at;
        int64_t block = item - f->items[at], blocks = e->wide / DEEP, which = block / blocks;
        int64_t unit = block % blocks * DEEP, tiles = e->slot * UP_TO(f->d, DEEP);
        if (which == 2 && f->dw_out)
            gradient(f, e, f->scaled + e->hidden + unit * e->slots, f->dy_along + tiles, e->width - unit,
                     f->dw_out + (e->unit + unit) * f->d, c);
        if (which < 2 && f->dw_in)
            gradient(f, e, f->dz_units + 2 * e->hidden + (which * e->wide + unit) * e->slots, f->x_along + tiles,
                     e->width - unit, f->dw_in + (2 * e->unit + which * e->width + unit) * f->d, c);
    }
    _mm_sfence();
    _tile_release();
}

/* Gradients of the rows' weights: items are experts. */
KERNEL(tile_dweight)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    for (int64_t at = begin; at < end; at++) {
        const struct expert *e = f->experts + at;
        const float *part = f->part + e->hidden / DEEP;
        for (int64_t i = 0; i < e->n; i++) {
            float total = 0;
            for (int64_t block = 0; block < e->wide / DEEP; block++)
                total += part[block * e->slots + i];
            f->dweight[e->row + i] = total;
        }
    }
}

#endif
