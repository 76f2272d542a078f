/* The backward pass of `expert_tiles.c`. */

#ifdef __AMX_BF16__

#include "tiles.h"

/* Gradients of 32 units, by units and slots, as the gradients of weights want them: of gate and up, weight * hidden. */
struct units {
    uint16_t *gate, *up, *scaled;
    int64_t stride;
};

/* dz, weight * hidden and what 16 units add to `dot`, <dhidden, hidden>, of 32 slots, from dhidden / weight in c; `to`
   are the units' own. */
static inline void swiglu_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot,
                               const struct both *weight, float (*c)[SIDE * SIDE], struct units to, struct both *dot) {
    const uint16_t *z = f->z + 2 * e->hidden + unit * e->slots + slot;
    __m512i of_gate[SIDE], of_up[SIDE];
    for (int64_t u = 0; u < SIDE; u++) {
        struct both gate = load_both(z + u * e->slots), up = load_both(z + (e->wide + u) * e->slots), scaled;
        int64_t at = (unit % DEEP + u) * to.stride + slot;
        for (int64_t i = 0; i < 2; i++) {
            vec dhidden = load(c[i] + u * SIDE), s = sigmoid(gate.half[i]), act = gate.half[i] * s;
            vec hidden = act * up.half[i], back = dhidden * weight->half[i];
            dot->half[i] += dhidden * hidden;
            scaled.half[i] = hidden * weight->half[i];
            gate.half[i] = back * up.half[i] * (s * (1.0f + gate.half[i] * (1.0f - s)));
            up.half[i] = back * act;
        }
        _mm512_storeu_si512(to.scaled + at, narrow_both(scaled));
        _mm512_storeu_si512(to.gate + at, of_gate[u] = narrow_both(gate));
        _mm512_storeu_si512(to.up + at, of_up[u] = narrow_both(up));
    }
    if (f->dz) {
        uint16_t *rows = f->dz + slot * stride_of_dz(e) + unit;
        store_exchanged(of_gate, rows, stride_of_dz(e));
        store_exchanged(of_up, rows + e->wide, stride_of_dz(e));
    }
}

/* The same for 32 units. */
static void block_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot,
                       float c[4][SIDE * SIDE], struct units to) {
    __mmask32 rows = first_columns(e->n - slot);
    struct both dot = {0}, weight;
    for (int64_t half = 0; half < 2; half++)
        weight.half[half] = (vec)_mm512_maskz_loadu_ps((__mmask16)(rows >> half * SIDE),
                                                      f->weight + e->row + slot + half * SIDE);
    swiglu_back(f, e, unit, slot, &weight, c, to, &dot);
    swiglu_back(f, e, unit + SIDE, slot, &weight, c + 2, to, &dot);
    float *part = f->part + e->hidden / DEEP + unit / DEEP * e->slots + slot;
    store(part, dot.half[0]);
    store(part + SIDE, dot.half[1]);
}

/* Back through weight * (hidden W_out) and SwiGLU, for 32 units; `copy` is room for 32 rows of W_out. */
static void units_back(const struct tiles *f, const struct expert *e, int64_t unit, uint16_t *copy, struct units to,
                       struct soon *soon) {
    int64_t deep = UP_TO(f->d, DEEP) / DEEP, stride;
    const uint16_t *one = f->w_out + (e->unit + unit) * f->d, *two = one + SIDE * f->d;
    float c[WAITING][4][SIDE * SIDE] __attribute__((aligned(64)));
    one = whole_rows(one, e->width - unit, f->d, copy, &stride);
    two = whole_rows(two, e->width - unit - SIDE, f->d, copy + SIDE * deep * DEEP, &stride);
    for (int64_t slot = 0, blocks; slot < e->slots; slot += blocks * DEEP) {
        int64_t rest = (e->slots - slot) / DEEP;
        blocks = together(deep) < rest ? together(deep) : rest;
        const uint16_t *dy = f->dy_across + slot / SIDE * deep * TILE;
        products(rows_as_they_lie(one, two, stride), dy, deep, blocks, c, soon);
        for (int64_t i = 0; i < blocks; i++)
            block_back(f, e, unit, slot + i * DEEP, c[i], to);
    }
}

/* Gradients of the weights of 32 units, of which `count` are there: a [units, slots] times the rows b, paired along
   slots. Two lines that follow each other go to memory together: that takes little more than half the time. */
static void gradient(const struct tiles *f, const struct expert *e, const uint16_t *a, int64_t stride,
                     const uint16_t *b, int64_t count, uint16_t *to, struct soon *soon) {
    int64_t deep = e->slots / DEEP;
    const struct left units = rows_as_they_lie(a, a + SIDE * stride, stride);
    float c[2][4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t column = 0; column < f->d; column += 2 * DEEP) {
        const uint16_t *left = b + column / SIDE * deep * TILE;
        __mmask32 mask = first_columns(f->d - column), more = first_columns(f->d - column - DEEP);
        product(&units, left, left + deep * TILE, deep, 1, c[0], 0, soon);
        if (more)
            product(&units, left + 2 * deep * TILE, left + 3 * deep * TILE, deep, 1, c[1], 0, soon);
        for (int64_t u = 0; u < DEEP && u < count; u++) {
            const float *one = c[0][u / SIDE * 2] + u % SIDE * SIDE, *two = c[1][u / SIDE * 2] + u % SIDE * SIDE;
            store_past_cache(to + u * f->d + column, mask, narrow(one, one + SIDE * SIDE));
            if (more)
                store_past_cache(to + u * f->d + column + DEEP, more, narrow(two, two + SIDE * SIDE));
        }
    }
}

/* What is read soon after a block of units: the next one's W_out and z, and W_in of this one for `tile_rows`. */
static struct soon soon_of_block(const struct tiles *f, int64_t block, int64_t blocks) {
    const struct expert *e = owner_of_block(f, block);
    struct soon soon = {0};
    if (block + 1 < blocks) {
        const struct expert *of = owner_of_block(f, block + 1);
        int64_t unit = (block + 1 - of->block) * DEEP;
        const uint16_t *z = f->z + 2 * of->hidden + unit * of->slots;
        add_region(&soon, f->w_out + (of->unit + unit) * f->d, f->d, 64);
        add_region(&soon, z, of->slots, 64);
        add_region(&soon, z + of->wide * of->slots, of->slots, 64);
    }
    if (f->dz && kept(f, e, 2)) {
        const uint16_t *gate = f->w_in + (2 * e->unit + (block - e->block) * DEEP) * f->d;
        add_region(&soon, gate, f->d, 64);
        add_region(&soon, gate + e->width * f->d, f->d, 64);
    }
    spread_over(&soon, (f->dw_in && f->dw_out ? 4 : 1) * (e->slots / DEEP) * UP_TO(f->d, DEEP) / DEEP);
    return soon;
}

/* dz of 32 units of an expert, and where wanted their weights' gradients: dW_in = dz^T x and
   dW_out = (weight * hidden)^T dy. Items are such blocks of units. */
KERNEL(tile_gradients)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t most = 0;
    for (int64_t item = begin; item < end; item++)
        most = owner_of_block(f, item)->slots > most ? owner_of_block(f, item)->slots : most;
    uint16_t *copy = scratch(2 * SIDE * UP_TO(f->d, DEEP)), *room = scratch(3 * DEEP * (most + DEEP));
    use_tiles();
    for (int64_t item = begin; item < end; item++) {
        const struct expert *e = owner_of_block(f, item);
        int64_t unit = (item - e->block) * DEEP, count = e->width - unit, stride = e->slots + DEEP;
        struct units to = {room, room + DEEP * stride, room + 2 * DEEP * stride, stride};
        struct soon soon = soon_of_block(f, item, end);
        units_back(f, e, unit, copy, to, &soon);
        if (f->dw_out)
            gradient(f, e, to.scaled, stride, f->dy_along, count, f->dw_out + (e->unit + unit) * f->d, &soon);
        if (f->dw_in) {
            uint16_t *dw_in = f->dw_in + (2 * e->unit + unit) * f->d;
            gradient(f, e, to.gate, stride, f->x_along, count, dw_in, &soon);
            gradient(f, e, to.up, stride, f->x_along, count, dw_in + e->width * f->d, &soon);
        }
    }
    _mm_sfence();
    _tile_release();
    free(copy);
    free(room);
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
