/* Gated experts with SiLU on rows sorted by expert, in bfloat16 on tiles of AMX: packing, and the forward pass.

   Products with a weight [units, d] along d take its rows as tiles of A, as they lie; their results lie [units, rows],
   as the gradients of weights want them. Products along units take the weight paired, 64 columns at a time. An expert's
   rows have slots up to the next multiple of 32; what fills them is zero. */

#ifdef __AMX_BF16__

#include "tiles.h"

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

static inline const uint16_t *row_at(const struct tiles *f, const uint16_t *of, const struct expert *e, int64_t slot) {
    return slot < e->n ? of + f->token[e->row + slot] * f->d : NULL;
}

/* 32 slots paired along d: tiles of 16 slots each. */
static void across(const struct tiles *f, const uint16_t *of, const struct expert *e, int64_t first, uint16_t *to) {
    int64_t deep = UP_TO(f->d, DEEP) / DEEP;
    for (int64_t half = 0; half < 2; half++) {
        int64_t slot = first + half * SIDE;
        for (int64_t k = 0; k < deep; k++) {
            __m512i v[SIDE];
            __mmask32 mask = first_columns(f->d - k * DEEP);
            for (int64_t i = 0; i < SIDE; i++) {
                const uint16_t *row = row_at(f, of, e, slot + i);
                v[i] = row ? _mm512_maskz_loadu_epi16(mask, row + k * DEEP) : _mm512_setzero_si512();
            }
            exchange(v);
            for (int64_t i = 0; i < SIDE; i++)
                _mm512_storeu_si512(to + (slot / SIDE * deep + k) * TILE + i * DEEP, v[i]);
        }
    }
}

/* 32 slots paired along slots: an expert's tiles of 16 columns, each all along its slots. */
static void along(const struct tiles *f, const uint16_t *of, const struct expert *e, int64_t first, uint16_t *to) {
    int64_t deep = e->slots / DEEP;
    uint16_t *tile = to + first / DEEP * TILE;
    for (int64_t i = 0; i < SIDE; i++) {
        const uint16_t *even = row_at(f, of, e, first + 2 * i), *odd = row_at(f, of, e, first + 2 * i + 1);
        for (int64_t column = 0; column < f->d; column += DEEP) {
            uint16_t *left = tile + column / SIDE * deep * TILE + i * DEEP;
            pair(even, odd, column, f->d, left, left + deep * TILE);
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
            across(f, f->x, e, first, f->x_across);
        if (f->dy_across)
            across(f, f->dy, e, first, f->dy_across);
        if (f->x_along)
            along(f, f->x, e, first, f->x_along);
        if (f->dy_along)
            along(f, f->dy, e, first, f->dy_along);
    }
}

/* z and hidden of 16 units and 32 slots from the products c with gate (0, 1) and up (2, 3). */
static void swiglu_tiles(const struct tiles *f, const struct expert *e, int64_t unit, int64_t slot,
                         float c[4][SIDE * SIDE]) {
    uint16_t *z = f->z ? f->z + 2 * e->hidden + unit * e->slots + slot : NULL;
    for (int64_t u = 0; z && u < SIDE; u++) {
        store_past_cache(z + u * e->slots, 0xffffffffu, narrow(c[0] + u * SIDE, c[1] + u * SIDE));
        store_past_cache(z + (e->wide + u) * e->slots, 0xffffffffu, narrow(c[2] + u * SIDE, c[3] + u * SIDE));
    }
    __m512i hidden[SIDE];
    for (int64_t u = 0; u < SIDE; u++) {
        struct both act;
        for (int64_t half = 0; half < 2; half++) {
            vec gate = load(c[half] + u * SIDE);
            act.half[half] = gate * sigmoid(gate) * load(c[2 + half] + u * SIDE);
        }
        hidden[u] = narrow_both(act);
    }
    store_exchanged(hidden, f->hidden + slot * stride_of_hidden(e) + unit, stride_of_hidden(e));
}

/* What is read soon after a half of a block of units: the next one's weights. */
static struct soon soon_of_half(const struct tiles *f, int64_t half, int64_t halves) {
    struct soon soon = {0};
    int64_t next = half + 1 < halves ? half + 1 : half, slots = owner_of_block(f, half / 2)->slots;
    const struct expert *of = owner_of_block(f, next / 2);
    const uint16_t *gate = f->w_in + (2 * of->unit + next * SIDE - of->block * DEEP) * f->d;
    add_region(&soon, gate, f->d / 2, 64);
    add_region(&soon, gate + of->width * f->d, f->d / 2, 64);
    spread_over(&soon, next > half ? slots / DEEP * UP_TO(f->d, DEEP) / DEEP : 0);
    return soon;
}

/* hidden = silu(x G) * (x U): items are 32 units of an expert, in halves. */
KERNEL(tile_hidden)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t deep = UP_TO(f->d, DEEP) / DEEP;
    uint16_t *copy = scratch(2 * SIDE * deep * DEEP);
    float c[WAITING][4][SIDE * SIDE] __attribute__((aligned(64)));
    use_tiles();
    for (int64_t half = 2 * begin; half < 2 * end; half++) {
        const struct expert *e = owner_of_block(f, half / 2);
        int64_t unit = half * SIDE - e->block * DEEP, stride;
        if (!e->n)
            continue;
        const uint16_t *gate = f->w_in + (2 * e->unit + unit) * f->d, *up = gate + e->width * f->d;
        struct soon soon = soon_of_half(f, half, 2 * end);
        gate = whole_rows(gate, e->width - unit, f->d, copy, &stride);
        up = whole_rows(up, e->width - unit, f->d, copy + SIDE * deep * DEEP, &stride);
        for (int64_t slot = 0, blocks; slot < e->slots; slot += blocks * DEEP) {
            int64_t rest = (e->slots - slot) / DEEP;
            blocks = together(deep) < rest ? together(deep) : rest;
            const uint16_t *b = f->x_across + slot / SIDE * deep * TILE;
            products(rows_as_they_lie(gate, up, stride), b, deep, blocks, c, &soon);
            for (int64_t i = 0; i < blocks; i++)
                swiglu_tiles(f, e, unit, slot + i * DEEP, c[i]);
        }
    }
    _mm_sfence();
    _tile_release();
    free(copy);
}

/* `count` rows of a weight, COLUMNS columns of them from `column` on, paired along units: tiles of 16 columns, each
   column of tiles `deep` tiles long, of which this writes those of `wide` units; zeros behind `count`. */
static void pair_weight(const uint16_t *w, int64_t count, int64_t wide, int64_t column, int64_t d, int64_t deep,
                        uint16_t *to) {
    int64_t stop = column + COLUMNS < d ? column + COLUMNS : d;
    for (int64_t u = 0; u < wide; u += 2) {
        const uint16_t *even = u < count ? w + u * d : NULL, *odd = u + 1 < count ? w + (u + 1) * d : NULL;
        uint16_t *left = to + u / DEEP * TILE + u % DEEP / 2 * DEEP;
        for (int64_t first = column; first < stop; first += DEEP, left += 2 * deep * TILE) {
            if (u + 13 < count) {
                _mm_prefetch((const char *)(w + (u + 12) * d + first), _MM_HINT_T0);
                _mm_prefetch((const char *)(w + (u + 13) * d + first), _MM_HINT_T0);
            }
            pair(even, odd, first, d, left, left + deep * TILE);
        }
    }
}

/* COLUMNS columns of an expert's rows: a [slots, 32 deep] times the paired weight b. */
static void rows_of(const struct tiles *f, const struct expert *e, const uint16_t *a, int64_t stride, const uint16_t *b,
                    int64_t deep, int64_t column) {
    float c[4][SIDE * SIDE] __attribute__((aligned(64)));
    int64_t stop = column + COLUMNS < f->d ? column + COLUMNS : f->d;
    for (int64_t slot = 0; slot < e->n; slot += DEEP) {
        const uint16_t *here = a + slot * stride, *left = b;
        const struct left rows = rows_as_they_lie(here, here + SIDE * stride, stride);
        for (int64_t first = column; first < stop; first += DEEP, left += 2 * deep * TILE) {
            __mmask32 mask = first_columns(f->d - first);
            product(&rows, left, left + deep * TILE, deep, 1, c, 0, NULL);
            for (int64_t i = 0; i < DEEP && slot + i < e->n; i++) {
                float *two = c[i / SIDE * 2] + i % SIDE * SIDE;
                _mm512_mask_storeu_epi16(f->rows + (e->slot + slot + i) * f->d + first, mask,
                                         narrow(two, two + SIDE * SIDE));
            }
        }
    }
}

/* rows = hidden W_out, or with dz its gradient's rows dz W_in: items are COLUMNS columns of an expert. */
KERNEL(tile_rows)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t blocks = UP_TO(f->d, COLUMNS) / COLUMNS, gates = f->dz ? 2 : 1, widest = 0;
    for (int64_t item = begin; item < end; item++)
        widest = f->experts[item / blocks].wide > widest ? f->experts[item / blocks].wide : widest;
    uint16_t *paired = scratch(gates * widest * COLUMNS);
    use_tiles();
    for (int64_t item = begin; item < end; item++) {
        const struct expert *e = f->experts + item / blocks;
        int64_t column = item % blocks * COLUMNS, half = e->wide / DEEP, deep = gates * half;
        const uint16_t *w = f->dz ? f->w_in + 2 * e->unit * f->d : f->w_out + e->unit * f->d;
        if (!e->n)
            continue;
        for (int64_t gate = 0; gate < gates; gate++)
            pair_weight(w + gate * e->width * f->d, e->width, e->wide, column, f->d, deep, paired + gate * half * TILE);
        if (f->dz)
            rows_of(f, e, f->dz, stride_of_dz(e), paired, deep, column);
        else
            rows_of(f, e, f->hidden, stride_of_hidden(e), paired, deep, column);
    }
    _tile_release();
    free(paired);
}

/* out = the sum of each token's rows, `weighted` or not, in the order of the rows: items are tokens. */
KERNEL(tile_sum)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    for (int64_t t = begin; t < end; t++)
        for (int64_t column = 0; column < f->d; column += DEEP) {
            __mmask32 mask = first_columns(f->d - column);
            vec low = {0}, high = {0};
            for (int64_t i = f->starts[t]; i < f->starts[t + 1]; i++) {
                int64_t n = f->order[i], slot = f->order[f->n + n];
                uint16_t row[DEEP];
                _mm512_storeu_si512(row, _mm512_maskz_loadu_epi16(mask, f->rows + slot * f->d + column));
                float weight = f->weighted ? f->weight[n] : 1.0f;
                low += load_bfloat16(row) * weight;
                high += load_bfloat16(row + SIDE) * weight;
            }
            _mm512_mask_storeu_epi16(f->out + t * f->d + column, mask,
                                     (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
}

#endif
