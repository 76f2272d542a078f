/* The backward pass of `expert_tiles.c`. */

#ifdef __AMX_BF16__

#include "tile_numbers.h"

/* Gradients of 32 units, by units and slots, as the gradients of weights want them: of gate and up, weight * hidden. */
struct units {
    uint16_t *gate, *up, *scaled;
    int64_t stride, deep; /* as `left_of` wants them */
};

/* dz, weight * hidden and what 16 units add to `dot`, <dhidden, hidden>, of 32 slots, from dhidden / weight in c; `to`
   are the units' own. */
static inline void swiglu_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot,
                               const struct both *weight, float (*c)[SIDE * SIDE], struct units to, struct both *dot) {
    int64_t z = 2 * e->hidden + unit * e->slots + slot;
    struct both of_gate[SIDE], of_up[SIDE];
    for (int64_t u = 0; u < SIDE; u++) {
        struct both gate = load_both(f, number(f, f->z, z + u * e->slots), 0xffffffffu), scaled;
        struct both up = load_both(f, number(f, f->z, z + (e->wide + u) * e->slots), 0xffffffffu);
        int64_t at = unit % DEEP + u;
        for (int64_t i = 0; i < 2; i++) {
            vec dhidden = load(c[i] + u * SIDE), s = sigmoid(f, gate.half[i]), act = gate.half[i] * s;
            vec hidden = act * up.half[i], back = dhidden * weight->half[i];
            dot->half[i] += dhidden * hidden;
            scaled.half[i] = hidden * weight->half[i];
            gate.half[i] = back * up.half[i] * (s * (1.0f + gate.half[i] * (1.0f - s)));
            up.half[i] = back * act;
        }
        store_unit(f, scaled, to.scaled, at, slot, to.stride, to.deep);
        store_unit(f, of_gate[u] = gate, to.gate, at, slot, to.stride, to.deep);
        store_unit(f, of_up[u] = up, to.up, at, slot, to.stride, to.deep);
    }
    if (f->dz) {
        store_exchanged(f, of_gate, f->dz, slot, unit, stride_of_dz(e), 2 * e->wide / DEEP);
        store_exchanged(f, of_up, f->dz, slot, e->wide + unit, stride_of_dz(e), 2 * e->wide / DEEP);
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
    int64_t deep = UP_TO(f->d, DEEP) / DEEP, count = e->width - unit;
    const void *one = number(f, f->w_out, (e->unit + unit) * f->d), *two = number(f, one, SIDE * f->d);
    float c[WAITING][4][SIDE * SIDE] __attribute__((aligned(64)));
    const struct left a = weights(f, one, count, two, count - SIDE, copy);
    for (int64_t slot = 0, blocks; slot < e->slots; slot += blocks * DEEP) {
        int64_t rest = (e->slots - slot) / DEEP;
        blocks = together(f, deep) < rest ? together(f, deep) : rest;
        const uint16_t *dy = f->dy_across + slot / SIDE * deep * tile_of(f);
        products(f, a, dy, deep, blocks, c, soon);
        for (int64_t i = 0; i < blocks; i++)
            block_back(f, e, unit, slot + i * DEEP, c[i], to);
    }
}

/* Gradients of the weights of 32 units, of which `count` are there: the units of `of` times the rows b, paired along
   slots. Two lines that follow each other go to memory together: that takes little more than half the time. */
static void gradient(const struct tiles *f, const struct expert *e, struct left units, const uint16_t *b, int64_t count,
                     void *to, struct soon *soon) {
    int64_t deep = e->slots / DEEP, tall = deep * tile_of(f);
    int64_t at_once = f->narrow ? 2 : 1; /* 32 numbers of float32 are two lines */
    float c[2][4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t column = 0; column < f->d; column += at_once * DEEP) {
        const uint16_t *left = b + column / SIDE * tall;
        for (int64_t i = 0; i < at_once && column + i * DEEP < f->d; i++, left += 2 * tall)
            product(&units, left, left + tall, deep, f->pieces, c[i], 0, soon);
        for (int64_t u = 0; u < DEEP && u < count; u++)
            for (int64_t i = 0; i < at_once; i++) {
                int64_t first = column + i * DEEP;
                float *two = c[i][u / SIDE * 2] + u % SIDE * SIDE;
                store_past_cache(f, number(f, to, u * f->d + first), first_columns(f->d - first),
                                 both_at(two, two + SIDE * SIDE));
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
        int64_t z = 2 * of->hidden + unit * of->slots;
        add_region(&soon, number(f, f->w_out, (of->unit + unit) * f->d), lines(f, DEEP * f->d), 64);
        add_region(&soon, number(f, f->z, z), lines(f, DEEP * of->slots), 64);
        add_region(&soon, number(f, f->z, z + of->wide * of->slots), lines(f, DEEP * of->slots), 64);
    }
    if (f->dz && kept(f, e, 2)) {
        int64_t gate = (2 * e->unit + (block - e->block) * DEEP) * f->d;
        add_region(&soon, number(f, f->w_in, gate), lines(f, DEEP * f->d), 64);
        add_region(&soon, number(f, f->w_in, gate + e->width * f->d), lines(f, DEEP * f->d), 64);
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
    int64_t units = DEEP * (most + DEEP) * f->pieces;
    uint16_t *copy = scratch(2 * DEEP * UP_TO(f->d, DEEP) * f->pieces), *room = scratch(2 * 3 * units);
    use_tiles();
    for (int64_t item = begin; item < end; item++) {
        const struct expert *e = owner_of_block(f, item);
        int64_t unit = (item - e->block) * DEEP, count = e->width - unit, stride = e->slots + DEEP, deep = e->slots / DEEP;
        struct units to = {room, room + units, room + 2 * units, stride, deep};
        struct soon soon = soon_of_block(f, item, end);
        units_back(f, e, unit, copy, to, &soon);
        const struct left gate = left_of(f, to.gate, 0, stride, deep), up = left_of(f, to.up, 0, stride, deep);
        const struct left scaled = left_of(f, to.scaled, 0, stride, deep);
        int64_t dw_in = (2 * e->unit + unit) * f->d, dw_out = (e->unit + unit) * f->d;
        if (f->dw_out)
            gradient(f, e, scaled, f->dy_along, count, number(f, f->dw_out, dw_out), &soon);
        if (f->dw_in) {
            gradient(f, e, gate, f->x_along, count, number(f, f->dw_in, dw_in), &soon);
            gradient(f, e, up, f->x_along, count, number(f, f->dw_in, dw_in + e->width * f->d), &soon);
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
