/* What the kernels of experts on tiles share: where everything lies. */

#ifndef MOESTRO_TILES_H
#define MOESTRO_TILES_H

#include <stdlib.h>

#include "pieces.h"

#define COLUMNS 128 /* of an expert's rows that are computed together */
#define UNITS 16    /* tiles along units that float32 takes together for them; bfloat16 half as many */
#define HALVES 4    /* halves of blocks of units that float32 takes together: their pieces stay in the cache */
#define BLOCKS 2    /* blocks of units whose gradients float32 takes together */

/* Experts are taken one after another by each core, or by all cores together: packed rows and hidden numbers lie in
   memory that the next expert writes again, so that it stays in the cache. Units come in blocks of DEEP. */
struct expert {
    int64_t n, row, slots, slot, width, unit, wide, hidden; /* wide: width up to DEEP; hidden: slots * wide before it */
    int64_t block;                                          /* blocks before it */
};

/* Numbers are all of float32, or of bfloat16 where `narrow`; what is multiplied is packed in pieces, of which numbers of
   bfloat16 have one. The pieces of hidden and dz lie by tiles of 16 slots along units, one after the other; in bfloat16
   by slots, with DEEP columns between that are not used: rows that are a multiple of a page apart would push each other
   out of the cache. */
struct tiles {
    const void *x, *dy;            /* [t, d] */
    const int64_t *token;          /* [n], rows in the order of their experts */
    const float *weight;           /* [n] */
    const struct expert *experts;  /* [e] */
    const void *w_in, *w_out;      /* [2 units, d], [units, d] */
    uint16_t *x_across, *x_along;  /* of the expert at work: rows of x, paired along d and along rows */
    uint16_t *dy_across, *dy_along;
    uint16_t *hidden;              /* of the expert at work: [slots, wide] */
    uint16_t *dz;                  /* of the expert at work: [slots, 2 wide] */
    void *z;                       /* an expert: [2 wide, slots]: gate, up */
    void *rows;                    /* [slots, d], what an expert adds to a token */
    float *part;                   /* an expert: [wide / DEEP, slots], gradients of weights */
    void *out;                     /* [t, d] */
    void *dw_in, *dw_out;
    float *dweight;                /* [n] */
    int64_t *starts, *order;       /* [t + 1], [n]: rows of every token, and their slots behind them [n] */
    const int64_t *whole;          /* [count] experts that are one core's each */
    int64_t *taken;                /* [1]: so many of them are taken */
    int64_t n, t, d, e, forward, narrow, pieces; /* forward: the pass is that one */
    int64_t count, most_slots, most_hidden; /* the most slots, and slots * wide, of an expert of one core */
};

/* Number `index` of a tensor. */
static inline void *number(const struct tiles *f, const void *tensor, int64_t index) {
    return (char *)tensor + index * (f->narrow ? 2 : 4);
}

/* Lines of memory that so many numbers are. */
static inline int64_t lines(const struct tiles *f, int64_t numbers) { return numbers / (f->narrow ? 32 : 16); }

static inline int64_t tile_of(const struct tiles *f) { return f->pieces * TILE; }

static inline int64_t stride_of_hidden(const struct expert *e) { return e->wide + DEEP; }
static inline int64_t stride_of_dz(const struct expert *e) { return 2 * e->wide + DEEP; }

/* Tiles of A: `deep` along k, from row `first` on, of memory that lies as hidden does; narrow rows are `stride` apart. */
static inline struct left left_of(const struct tiles *f, const uint16_t *of, int64_t first, int64_t stride,
                                  int64_t deep) {
    int64_t tall = deep * tile_of(f);
    if (f->narrow)
        return (struct left){of + first * stride, of + (first + SIDE) * stride, stride, DEEP};
    return (struct left){of + first / SIDE * tall, of + (first / SIDE + 1) * tall, DEEP, tile_of(f)};
}

/* The same from tile k on. */
static inline struct left from_tile(struct left a, int64_t k) {
    return (struct left){a.top + k * a.step, a.bottom + k * a.step, a.stride, a.step};
}

/* The expert whose slots, or whose blocks of units, hold this one: where several begin there, the last is not empty. */
#define OWNER(name, begins)                                                                                            \
    static inline const struct expert *name(const struct tiles *f, int64_t at) {                                       \
        int64_t low = 0, high = f->e - 1;                                                                              \
        while (low < high) {                                                                                           \
            int64_t middle = (low + high + 1) / 2;                                                                     \
            if (f->experts[middle].begins <= at)                                                                       \
                low = middle;                                                                                          \
            else                                                                                                       \
                high = middle - 1;                                                                                     \
        }                                                                                                              \
        return f->experts + low;                                                                                       \
    }

OWNER(owner_of_slot, slot)
OWNER(owner_of_block, block)

/* Lines of a weight that is read in columns, and asked for in the order in which it lies, while its units are worked on
   otherwise: half of the smallest cache of a core that has tiles. Larger ones are asked for column by column. */
#define KEPT (1 << 14)
static inline int kept(const struct tiles *f, const struct expert *e, int64_t gates) {
    return lines(f, gates * e->width * f->d) <= KEPT;
}

/* Tiles of k of bfloat16 that are taken together where there are more: 2 * 16 rows of A and as many columns of B are then
   in the nearest cache while slots pass by; and blocks of 32 slots whose sums wait meanwhile. */
#define STEP 8
#define WAITING 8

/* How many of so many blocks of slots are taken together. */
static inline int64_t together(const struct tiles *f, int64_t deep) { return f->narrow && deep > STEP ? WAITING : 1; }

/* 32 rows of A times `count` blocks of 32 slots, of which `slots` are there, whose tiles along k follow each other from b
   on. */
static inline void products(const struct tiles *f, struct left a, const uint16_t *b, int64_t deep, int64_t count,
                            int64_t slots, float c[WAITING][4][SIDE * SIDE], struct soon *soon) {
    struct extent there = WHOLE;
    int64_t steps = f->narrow ? (deep + STEP - 1) / STEP : 1, step = steps ? (deep + steps - 1) / steps : 0;
    for (int64_t k = 0; k < deep; k += step) {
        struct left here = from_tile(a, k);
        for (int64_t i = 0; i < count; i++) {
            const uint16_t *left = b + (2 * i * deep + k) * tile_of(f);
            there.columns = slots - i * DEEP;
            product(&here, left, left + deep * tile_of(f), deep - k < step ? deep - k : step, f->pieces, &there, c[i],
                    k > 0, soon);
        }
    }
}

static inline void *scratch(int64_t bytes) {
    void *room = aligned_alloc(64, UP_TO(bytes + 64, 64));
    require_memory(room != NULL);
    return room;
}

#endif
