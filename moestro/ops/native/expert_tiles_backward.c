/* The backward pass of `expert_tiles.c`. */

#ifdef __AVX512F__

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

/* Back through weight * (hidden W_out) and SwiGLU, for so many blocks of 32 units, slot by slot; `copy` is room for
   their rows of W_out. */
static void units_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t count, uint16_t *copy,
                       const struct units to[BLOCKS], struct soon *soon) {
    int64_t deep = UP_TO(f->d, DEEP) / DEEP, blocks;
    float c[WAITING][4][SIDE * SIDE] __attribute__((aligned(64)));
    struct left a[BLOCKS];
    for (int64_t i = 0; i < count; i++) {
        int64_t rest = e->width - unit - i * DEEP;
        const void *one = number(f, f->w_out, (e->unit + unit + i * DEEP) * f->d), *two = number(f, one, SIDE * f->d);
        a[i] = weights(f, one, rest, two, rest - SIDE, copy + 2 * i * deep * tile_of(f));
    }
    for (int64_t slot = 0; slot < e->slots; slot += blocks * DEEP) {
        int64_t rest = (e->slots - slot) / DEEP;
        blocks = together(f, deep) < rest ? together(f, deep) : rest;
        const uint16_t *dy = f->dy_across + slot / SIDE * deep * tile_of(f);
        for (int64_t i = 0; i < count; i++) {
            products(f, a[i], dy, deep, blocks, e->n - slot, c, soon);
            for (int64_t j = 0; j < blocks; j++)
                block_back(f, e, unit + i * DEEP, slot + j * DEEP, c[j], to[i]);
        }
    }
}

/* Gradients of the weights of 32 units, of which `count` are there. */
struct wanted {
    struct left units;
    int64_t count;
    void *to;
};

/* What there is of an expert's slots where they are summed over. Their pairs are as `pack_along` has them. */
static inline struct extent slots_there(const struct tiles *f, const struct expert *e) {
    struct extent there = WHOLE;
    int64_t last = e->n - (e->slots - DEEP);
    there.pairs[0] = f->narrow ? (last + 1) / 2 : last < SIDE ? last : SIDE;
    there.pairs[1] = last > SIDE ? last - SIDE : 0;
    return there;
}

/* All of these: units times the rows b, paired along slots. Two lines that follow each other go to memory together: that
   takes little more than half the time. */
static void gradients(const struct tiles *f, const struct expert *e, const uint16_t *b, const struct wanted *wanted,
                      int64_t many, struct soon *soon) {
    int64_t deep = e->slots / DEEP, tall = deep * tile_of(f);
    int64_t at_once = f->narrow ? 2 : 1; /* 32 numbers of float32 are two lines */
    float c[2][4][SIDE * SIDE] __attribute__((aligned(64)));
    struct extent there = slots_there(f, e);
    for (int64_t column = 0; column < f->d; column += at_once * DEEP)
        for (const struct wanted *w = wanted; w < wanted + many; w++) {
            const uint16_t *left = b + column / SIDE * tall;
            there.rows = w->count;
            for (int64_t i = 0; i < at_once && column + i * DEEP < f->d; i++, left += 2 * tall)
                product(&w->units, left, left + tall, deep, f->pieces, &there, c[i], 0, soon);
            for (int64_t u = 0; u < DEEP && u < w->count; u++)
                for (int64_t i = 0; i < at_once; i++) {
                    int64_t first = column + i * DEEP;
                    float *two = c[i][u / SIDE * 2] + u % SIDE * SIDE;
                    store_past_cache(f, number(f, w->to, u * f->d + first), first_columns(f->d - first),
                                     both_at(two, two + SIDE * SIDE));
                }
        }
}

/* What is read soon after `count` blocks of units: the next ones' W_out and z, and W_in of these for `tile_rows`. */
static struct soon soon_of_blocks(const struct tiles *f, int64_t block, int64_t count, int64_t blocks) {
    const struct expert *e = owner_of_block(f, block);
    struct soon soon = {0};
    if (block + count < blocks) {
        const struct expert *of = owner_of_block(f, block + count);
        int64_t unit = (block + count - of->block) * DEEP, rest = of->width - unit;
        int64_t units = count * DEEP < rest ? count * DEEP : rest, z = 2 * of->hidden + unit * of->slots;
        add_lines(&soon, number(f, f->w_out, (of->unit + unit) * f->d), lines(f, units * f->d));
        add_lines(&soon, number(f, f->z, z), lines(f, units * of->slots));
        add_lines(&soon, number(f, f->z, z + of->wide * of->slots), lines(f, units * of->slots));
    }
    if (f->dz && kept(f, e, 2)) {
        int64_t gate = (2 * e->unit + (block - e->block) * DEEP) * f->d;
        add_lines(&soon, number(f, f->w_in, gate), lines(f, count * DEEP * f->d));
        add_lines(&soon, number(f, f->w_in, gate + e->width * f->d), lines(f, count * DEEP * f->d));
    }
    spread_over(&soon, (f->dw_in && f->dw_out ? 4 : 1) * count * (e->slots / DEEP) * UP_TO(f->d, DEEP) / DEEP);
    return soon;
}

/* dz of so many blocks of units of an expert, and where wanted their weights' gradients; `room` is for the units. */
static void blocks_back(const struct tiles *f, const struct expert *e, int64_t unit, int64_t count, uint16_t *copy,
                        uint16_t *room, struct soon *soon) {
    int64_t stride = e->slots + DEEP, deep = e->slots / DEEP, size = DEEP * stride * f->pieces;
    struct units to[BLOCKS];
    struct wanted dw_in[2 * BLOCKS], dw_out[BLOCKS];
    for (int64_t i = 0; i < count; i++) {
        int64_t first = unit + i * DEEP, rest = e->width - first, gate = (2 * e->unit + first) * f->d;
        to[i] = (struct units){room, room + size, room + 2 * size, stride, deep};
        room += 3 * size;
        dw_out[i] = (struct wanted){left_of(f, to[i].scaled, 0, stride, deep), rest,
                                    number(f, f->dw_out, (e->unit + first) * f->d)};
        dw_in[2 * i] = (struct wanted){left_of(f, to[i].gate, 0, stride, deep), rest, number(f, f->dw_in, gate)};
        dw_in[2 * i + 1] = (struct wanted){left_of(f, to[i].up, 0, stride, deep), rest,
                                           number(f, f->dw_in, gate + e->width * f->d)};
    }
    units_back(f, e, unit, count, copy, to, soon);
    if (f->dw_out)
        gradients(f, e, f->dy_along, dw_out, count, soon);
    if (f->dw_in)
        gradients(f, e, f->x_along, dw_in, 2 * count, soon);
}

/* dz of 32 units of an expert, and where wanted their weights' gradients: dW_in = dz^T x and
   dW_out = (weight * hidden)^T dy. Items are such blocks of units. */
KERNEL(tile_gradients)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t most = 0, together = f->narrow ? 1 : BLOCKS;
    for (int64_t item = begin; item < end; item++)
        most = owner_of_block(f, item)->slots > most ? owner_of_block(f, item)->slots : most;
    uint16_t *copy = scratch(2 * together * DEEP * UP_TO(f->d, DEEP) * f->pieces);
    uint16_t *room = scratch(2 * together * 3 * DEEP * (most + DEEP) * f->pieces);
    use_tiles();
    for (int64_t item = begin, count; item < end; item += count) {
        const struct expert *e = owner_of_block(f, item);
        int64_t own = e->block + e->wide / DEEP - item, rest = own < end - item ? own : end - item;
        count = rest < together ? rest : together;
        struct soon soon = soon_of_blocks(f, item, count, end);
        blocks_back(f, e, (item - e->block) * DEEP, count, copy, room, &soon);
    }
    _mm_sfence();
    release_tiles();
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
