/* Gated experts with SiLU on rows sorted by expert, in tiles: packing, and the forward pass.

   Products with a weight [units, d] along d take its rows as tiles of A; their results lie [units, rows],
   as the gradients of weights want them. Products along units take the weight paired, 64 columns at a time. An expert's
   rows have slots up to the next multiple of 32; what fills them is zero. */

#ifdef __AVX512F__

#include "tile_numbers.h"

/* Where every token's rows and every row's slot are: one item. */
KERNEL(tile_places)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    if (begin >= end)
        return;
    int64_t *slots = f->order + f->n;
    memset(f->starts, 0, (f->t + 1) * sizeof(int64_t));
    for (int64_t n = 0; n < f->n; n++)
        f->starts[f->token[n] + 1]++;
    for (int64_t t = 0; t < f->t; t++)
        f->starts[t + 1] += f->starts[t];
    for (int64_t n = 0; n < f->n; n++)
        f->order[f->starts[f->token[n]]++] = n;
    for (int64_t t = f->t; t > 0; t--)
        f->starts[t] = f->starts[t - 1];
    f->starts[0] = 0;
    for (int64_t e = 0; e < f->e; e++)
        for (int64_t i = 0; i < f->experts[e].n; i++)
            slots[f->experts[e].row + i] = f->experts[e].slot + i;
}

static inline const void *row_at(const struct tiles *f, const void *of, const struct expert *e, int64_t slot) {
    return slot < e->n ? number(f, of, f->token[e->row + slot] * f->d) : NULL;
}

/* 32 slots paired along d: tiles of 16 slots each. */
static void pack_across(const struct tiles *f, const void *of, const struct expert *e, int64_t first, uint16_t *to) {
    int64_t deep = UP_TO(f->d, DEEP) / DEEP;
    for (int64_t slot = first; slot < first + DEEP; slot += SIDE) {
        const void *rows[SIDE];
        for (int64_t i = 0; i < SIDE; i++)
            rows[i] = row_at(f, of, e, slot + i);
        for (int64_t k = 0; k < deep; k++)
            across(f, rows, k * DEEP, to + (slot / SIDE * deep + k) * tile_of(f));
    }
}

/* 32 slots paired along slots: an expert's tiles of 16 columns, each all along its slots. Pairs are as `store_unit` has
   them: neighbours in bfloat16, else 16 apart. */
static void pack_along(const struct tiles *f, const void *of, const struct expert *e, int64_t first, uint16_t *to) {
    int64_t tall = e->slots / DEEP * tile_of(f), next = f->narrow ? 1 : SIDE;
    uint16_t *tile = to + first / DEEP * tile_of(f);
    for (int64_t i = 0; i < SIDE; i++) {
        int64_t slot = first + (f->narrow ? 2 * i : i);
        const void *one = row_at(f, of, e, slot), *two = row_at(f, of, e, slot + next);
        for (int64_t column = 0; column < f->d; column += DEEP) {
            uint16_t *left = tile + column / SIDE * tall + i * DEEP;
            pair(f, one, two, column, left, left + tall);
        }
    }
}

/* The rows of x and of dy, where there is one, as tiles of B: items are 32 slots of an expert. */
KERNEL(tile_pack)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    for (int64_t item = begin; item < end; item++) {
        const struct expert *e = owner_of_slot(f, item * DEEP);
        int64_t first = item * DEEP - e->slot;
        if (f->x_across)
            pack_across(f, f->x, e, first, f->x_across);
        if (f->dy_across)
            pack_across(f, f->dy, e, first, f->dy_across);
        if (f->x_along)
            pack_along(f, f->x, e, first, f->x_along);
        if (f->dy_along)
            pack_along(f, f->dy, e, first, f->dy_along);
    }
}

/* z and hidden of 16 units and 32 slots from the products c with gate (0, 1) and up (2, 3). */
static void swiglu_tiles(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot,
                         float c[4][SIDE * SIDE]) {
    int64_t z = 2 * e->hidden + unit * e->slots + slot;
    struct both hidden[SIDE];
    for (int64_t u = 0; u < SIDE; u++) {
        struct both gate = both_at(c[0] + u * SIDE, c[1] + u * SIDE), up = both_at(c[2] + u * SIDE, c[3] + u * SIDE);
        if (f->z) {
            store_past_cache(f, number(f, f->z, z + u * e->slots), 0xffffffffu, gate);
            store_past_cache(f, number(f, f->z, z + (e->wide + u) * e->slots), 0xffffffffu, up);
        }
        for (int64_t half = 0; half < 2; half++)
            hidden[u].half[half] = gate.half[half] * sigmoid(f, gate.half[half]) * up.half[half];
    }
    store_exchanged(f, hidden, f->hidden, slot, unit, stride_of_hidden(e), e->wide / DEEP);
}

/* What is read soon after `count` halves of blocks of units: the next ones' weights. */
static struct soon soon_of_halves(const struct tiles *f, int64_t half, int64_t count, int64_t halves) {
    struct soon soon = {0};
    int64_t next = half + count < halves ? half + count : half, slots = owner_of_block(f, half / 2)->slots;
    const struct expert *of = owner_of_block(f, next / 2);
    int64_t unit = next * SIDE - of->block * DEEP, units = count * SIDE;
    int64_t gate = (2 * of->unit + unit) * f->d, rest = of->width - unit;
    int64_t many = lines(f, (units < rest ? units : rest) * f->d);
    add_lines(&soon, number(f, f->w_in, gate), many);
    add_lines(&soon, number(f, f->w_in, gate + of->width * f->d), many);
    spread_over(&soon, next > half ? count * slots / DEEP * UP_TO(f->d, DEEP) / DEEP : 0);
    return soon;
}

/* Halves of blocks of units, from `half` on and before `stop`, that are computed together: of one expert. */
static inline int64_t halves_together(const struct tiles *f, const struct expert *e, int64_t half, int64_t stop) {
    int64_t own = 2 * (e->block + e->wide / DEEP);
    stop = stop < own ? stop : own;
    return f->narrow ? 1 : stop - half < HALVES ? stop - half : HALVES;
}

/* hidden of so many halves, slot by slot; `copy` is room for their weights. */
static void halves_of(const struct tiles *f, const struct expert *e, int64_t half, int64_t halves, uint16_t *copy,
                      struct soon *soon) {
    int64_t deep = UP_TO(f->d, DEEP) / DEEP, first = half * SIDE - e->block * DEEP, blocks;
    struct left a[HALVES];
    float c[WAITING][4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < halves; i++) {
        int64_t unit = first + i * SIDE, at = (2 * e->unit + unit) * f->d, count = e->width - unit;
        a[i] = weights(f, number(f, f->w_in, at), count, number(f, f->w_in, at + e->width * f->d), count,
                       copy + 2 * i * deep * tile_of(f));
    }
    for (int64_t slot = 0; slot < e->slots; slot += blocks * DEEP) {
        int64_t rest = (e->slots - slot) / DEEP;
        blocks = together(f, deep) < rest ? together(f, deep) : rest;
        const uint16_t *b = f->x_across + slot / SIDE * deep * tile_of(f);
        for (int64_t i = 0; i < halves; i++) {
            products(f, a[i], b, deep, blocks, e->n - slot, c, soon);
            for (int64_t j = 0; j < blocks; j++)
                swiglu_tiles(f, e, first + i * SIDE, slot + j * DEEP, c[j]);
        }
    }
}

/* hidden = silu(x G) * (x U): items are 32 units of an expert, in halves. */
KERNEL(tile_hidden)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    uint16_t *copy = scratch(2 * 2 * HALVES * UP_TO(f->d, DEEP) / DEEP * tile_of(f));
    use_tiles();
    for (int64_t half = 2 * begin, count; half < 2 * end; half += count) {
        const struct expert *e = owner_of_block(f, half / 2);
        struct soon soon;
        count = halves_together(f, e, half, 2 * end);
        if (!e->n)
            continue;
        soon = soon_of_halves(f, half, count, 2 * end);
        halves_of(f, e, half, count, copy, &soon);
    }
    _mm_sfence();
    release_tiles();
    free(copy);
}

/* A tile along units of the `count` rows of a weight from w on, and COLUMNS columns from `column` on, paired: tiles of
   16 columns, `tall` numbers apart; zeros behind `count`. */
static void pair_weight(const struct tiles *f, const void *w, int64_t count, int64_t column, int64_t tall,
                        uint16_t *to) {
    int64_t stop = column + COLUMNS < f->d ? column + COLUMNS : f->d;
    for (int64_t u = 0; u < DEEP; u += 2) {
        const void *even = u < count ? number(f, w, u * f->d) : NULL;
        const void *odd = u + 1 < count ? number(f, w, (u + 1) * f->d) : NULL;
        uint16_t *left = to + u / 2 * DEEP;
        for (int64_t first = column; first < stop; first += DEEP, left += 2 * tall) {
            if (u + 13 < count)
                for (int64_t i = 12; i < 14; i++)
                    for (int64_t line = 0; line < lines(f, DEEP); line++)
                        _mm_prefetch((char *)number(f, w, (u + i) * f->d + first) + 64 * line, _MM_HINT_T0);
            pair(f, even, odd, first, left, left + tall);
        }
    }
}

/* Tiles `tile`.. of an expert's weight, gates before ups, paired by `pair_weight`. */
static void pair_weights(const struct tiles *f, const struct expert *e, int64_t tile, int64_t count, int64_t column,
                         uint16_t *to) {
    int64_t half = e->wide / DEEP;
    for (int64_t i = tile; i < tile + count; i++, to += tile_of(f)) {
        int64_t gate = i / half, unit = i % half * DEEP;
        const void *w = f->dz ? number(f, f->w_in, (2 * e->unit + gate * e->width + unit) * f->d)
                              : number(f, f->w_out, (e->unit + unit) * f->d);
        pair_weight(f, w, e->width - unit, column, count * tile_of(f), to);
    }
}

/* 32 rows and columns of what experts add to their tokens. */
static void store_rows(const struct tiles *f, const struct expert *e, int64_t slot, int64_t column,
                       float c[4][SIDE * SIDE]) {
    __mmask32 mask = first_columns(f->d - column);
    for (int64_t i = 0; i < DEEP && slot + i < e->n; i++) {
        float *two = c[i / SIDE * 2] + i % SIDE * SIDE;
        store_both(f, number(f, f->rows, (e->slot + slot + i) * f->d + column), mask,
                   both_at(two, two + SIDE * SIDE));
    }
}

/* Tiles along units whose pairs of weights are together in the cache. */
static inline int64_t units_together(const struct tiles *f, int64_t deep) {
    return !deep ? 0 : f->narrow ? UNITS / 2 : UNITS;
}

/* What is read soon after the weights of `count` tiles along units from k on: the next ones', in the same columns or, where
   there are no more, in the next. In bfloat16 that would take longer than not asking. */
static struct soon soon_of_rows(const struct tiles *f, const struct expert *e, int64_t column, int64_t k, int64_t count,
                                int64_t deep) {
    struct soon soon = {0};
    int64_t half = e->wide / DEEP, columns = f->d - column < COLUMNS ? f->d - column : COLUMNS;
    int64_t next = k + count < deep ? k + count : 0, first = next ? column : column + COLUMNS;
    int64_t gates = f->dz ? 2 : 1, row = next / (half ? half : 1) * e->width + next % (half ? half : 1) * DEEP;
    int64_t rest = gates * e->width - row, rows = count * DEEP < rest ? count * DEEP : rest;
    const void *w = f->dz ? number(f, f->w_in, 2 * e->unit * f->d) : number(f, f->w_out, e->unit * f->d);
    if (f->narrow || first >= f->d || !half)
        return soon;
    int64_t run = lines(f, UP_TO(f->d - first < COLUMNS ? f->d - first : COLUMNS, SIDE));
    add_region(&soon, number(f, w, row * f->d + first), rows * run, f->d * 4, run);
    spread_over(&soon, (e->n + DEEP - 1) / DEEP * UP_TO(columns, DEEP) / DEEP * count);
    return soon;
}

/* COLUMNS columns of an expert's rows: hidden, or dz, times the weight, so many tiles along units at a time; `sums` wait
   where there are more. */
static void rows_of(const struct tiles *f, const struct expert *e, int64_t column, uint16_t *paired,
                    float (*sums)[4][SIDE * SIDE]) {
    int64_t stop = column + COLUMNS < f->d ? column + COLUMNS : f->d, deep = (f->dz ? 2 : 1) * e->wide / DEEP;
    const uint16_t *rows = f->dz ? f->dz : f->hidden;
    int64_t stride = f->dz ? stride_of_dz(e) : stride_of_hidden(e), step = units_together(f, deep);
    for (int64_t k = 0; !k || k < deep; k += step ? step : 1) { /* once where there are no units, for zeros */
        int64_t count = deep - k < step ? deep - k : step, tall = count * tile_of(f), at = 0;
        struct soon soon = soon_of_rows(f, e, column, k, count, deep);
        pair_weights(f, e, k, count, column, paired);
        for (int64_t slot = 0; slot < e->n; slot += DEEP) {
            const struct left a = from_tile(left_of(f, rows, slot, stride, deep), k);
            const uint16_t *b = paired;
            struct extent there = WHOLE;
            there.rows = e->n - slot;
            for (int64_t first = column; first < stop; first += DEEP, b += 2 * tall, at += step < deep) {
                product(&a, b, b + tall, count, f->pieces, &there, sums[at], k > 0, soon.count ? &soon : NULL);
                if (k + step >= deep)
                    store_rows(f, e, slot, first, sums[at]);
            }
        }
    }
}

/* rows = hidden W_out, or with dz its gradient's rows dz W_in: items are COLUMNS columns of an expert. */
KERNEL(tile_rows)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t blocks = UP_TO(f->d, COLUMNS) / COLUMNS, deepest = 0, most = 0;
    for (int64_t item = begin; item < end; item++) {
        const struct expert *e = f->experts + item / blocks;
        int64_t deep = (f->dz ? 2 : 1) * e->wide / DEEP;
        deepest = deep > deepest ? deep : deepest;
        most = e->slots > most ? e->slots : most;
    }
    int64_t step = units_together(f, deepest), waiting = step < deepest ? most * COLUMNS / (DEEP * DEEP) : 1;
    uint16_t *paired = scratch(2 * (step < deepest ? step : deepest) * COLUMNS / SIDE * tile_of(f));
    float(*sums)[4][SIDE * SIDE] = scratch(waiting * sizeof *sums);
    use_tiles();
    for (int64_t item = begin; item < end; item++)
        rows_of(f, f->experts + item / blocks, item % blocks * COLUMNS, paired, sums);
    release_tiles();
    free(paired);
    free(sums);
}

/* The slot of a row, rows by their tokens. */
static inline int64_t slot_of(const struct tiles *f, int64_t i) { return f->order[f->n + f->order[i]]; }

/* out = the sum of each token's rows, weighted in the forward pass, in the order of the rows: items are tokens. */
KERNEL(tile_sum)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    for (int64_t t = begin; t < end; t++)
        for (int64_t column = 0; column < f->d; column += DEEP) {
            __mmask32 mask = first_columns(f->d - column);
            struct both total = {0};
            for (int64_t i = f->starts[t + 1]; t + 1 < end && i < f->starts[t + 2]; i++)
                for (int64_t line = 0; line < lines(f, DEEP); line++)
                    _mm_prefetch((char *)number(f, f->rows, slot_of(f, i) * f->d + column) + 64 * line, _MM_HINT_T0);
            for (int64_t i = f->starts[t]; i < f->starts[t + 1]; i++) {
                struct both row = load_both(f, number(f, f->rows, slot_of(f, i) * f->d + column), mask);
                float weight = f->forward ? f->weight[f->order[i]] : 1.0f;
                total.half[0] += row.half[0] * weight;
                total.half[1] += row.half[1] * weight;
            }
            store_both(f, number(f, f->out, t * f->d + column), mask, total);
        }
}

#endif
