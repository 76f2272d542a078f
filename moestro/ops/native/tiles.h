/* What the kernels of experts on tiles share: where things lie, and how rows become tiles and back. A tile of A is rows
   as they lie in memory; a pair of a tile of B is two neighbours along k. */

#ifndef MOESTRO_TILES_H
#define MOESTRO_TILES_H

#include <stdlib.h>

#include "pieces.h"

#define COLUMNS 128 /* of an expert's rows that are computed together */

/* Experts are taken one after another by each core, or by all cores together: packed rows and hidden numbers lie in
   memory that the next expert writes again, so that it stays in the cache. Units come in blocks of DEEP. */
struct expert {
    int64_t n, row, slots, slot, width, unit, wide, hidden; /* wide: width up to DEEP; hidden: slots * wide before it */
    int64_t block;                                          /* blocks before it */
};

struct tiles {
    const uint16_t *x, *dy;        /* [t, d] */
    const int64_t *token;          /* [n], rows in the order of their experts */
    const float *weight;           /* [n] */
    const struct expert *experts;  /* [e] */
    const uint16_t *w_in, *w_out;  /* [2 units, d], [units, d] */
    uint16_t *x_across, *x_along;  /* of the expert at work: rows of x, paired along d and along rows */
    uint16_t *dy_across, *dy_along;
    uint16_t *hidden;              /* of the expert at work: [slots, wide + DEEP], the last columns unused */
    uint16_t *dz;                  /* of the expert at work: [slots, 2 wide + DEEP], likewise */
    uint16_t *z;                   /* an expert: [2 wide, slots]: gate, up */
    uint16_t *rows;                /* [slots, d], what an expert adds to a token */
    float *part;                   /* an expert: [wide / DEEP, slots], gradients of weights */
    uint16_t *out;                 /* [t, d] */
    uint16_t *dw_in, *dw_out;
    float *dweight;                /* [n] */
    int64_t *starts, *order;       /* [t + 1], [n]: rows of every token, and their slots behind them [n] */
    const int64_t *whole;          /* [count] experts that are one core's each */
    int64_t *taken;                /* [1]: so many of them are taken */
    int64_t n, t, d, e, weighted;
    int64_t count, most_slots, most_hidden; /* the most slots, and slots * wide, of an expert of one core */
};

/* Rows that are a multiple of a page apart would push each other out of the cache: hence the columns between. */
static inline int64_t stride_of_hidden(const struct expert *e) { return e->wide + DEEP; }
static inline int64_t stride_of_dz(const struct expert *e) { return 2 * e->wide + DEEP; }

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

/* Bytes of a weight that is read in columns, and asked for in the order in which it lies, while its units are worked on
   otherwise: half of the smallest cache of a core that has tiles. Larger ones are asked for column by column. */
#define KEPT (1 << 20)
static inline int kept(const struct tiles *f, const struct expert *e, int64_t gates) {
    return gates * e->width * f->d * 2 <= KEPT;
}

/* Tiles of k that are taken together where there are more: 2 * 16 rows of A then stay in the nearest cache while slots
   pass by; and blocks of 32 slots whose sums wait meanwhile. */
#define STEP 16
#define WAITING 8

/* How many of so many blocks of slots are taken together. */
static inline int64_t together(int64_t deep) { return deep > STEP ? WAITING : 1; }

/* 32 rows of A, as they lie: where the first and the last 16 begin. */
static inline struct left rows_as_they_lie(const uint16_t *top, const uint16_t *bottom, int64_t stride) {
    return (struct left){top, bottom, stride, DEEP};
}

/* 32 rows of A times `count` blocks of 32 slots, whose tiles along k follow each other from b on. */
static inline void products(struct left a, const uint16_t *b, int64_t deep, int64_t count,
                            float c[WAITING][4][SIDE * SIDE], struct soon *soon) {
    int64_t steps = (deep + STEP - 1) / STEP, step = steps ? (deep + steps - 1) / steps : 0;
    for (int64_t k = 0; k < deep; k += step) {
        for (int64_t i = 0; i < count; i++) {
            const uint16_t *left = b + (2 * i * deep + k) * TILE;
            product(&a, left, left + deep * TILE, deep - k < step ? deep - k : step, 1, c[i], k > 0, soon);
        }
        a.top += step * a.step;
        a.bottom += step * a.step;
    }
}

static inline __mmask32 first_columns(int64_t count) {
    return count >= DEEP ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

/* Columns first..first+31 of two rows, paired, to one row of each of two tiles of B; a row may be missing. */
static inline void pair(const uint16_t *even, const uint16_t *odd, int64_t first, int64_t d, uint16_t *left,
                        uint16_t *right) {
    __mmask32 mask = first_columns(d - first);
    __m512i low = even ? _mm512_maskz_loadu_epi16(mask, even + first) : _mm512_setzero_si512();
    __m512i high = odd ? _mm512_maskz_loadu_epi16(mask, odd + first) : _mm512_setzero_si512();
    __m512i a = _mm512_unpacklo_epi16(low, high), b = _mm512_unpackhi_epi16(low, high);
    /* the quarters of a and b in turn: 0a 0b 1a 1b, 2a 2b 3a 3b */
    const __m512i one = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i two = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(left, _mm512_permutex2var_epi64(a, one, b));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi64(a, two, b));
}

/* 32 numbers in bfloat16, of 16 and 16. */
static inline __m512i narrow(const float *left, const float *right) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(right), _mm512_loadu_ps(left));
}

/* 1 / (1 + e^-z), to 2^-17 of itself: what is made of it is rounded to bfloat16. */
static inline vec sigmoid(vec z) {
    const __m512 most = _mm512_set1_ps(126.0f);
    __m512 x = _mm512_mul_ps((__m512)z, _mm512_set1_ps(-1.44269504088896f));
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(most, x)); /* in this order they keep what is no number */
    __m512 whole = _mm512_roundscale_ps(x, 8);
    vec r = (vec)_mm512_sub_ps(x, whole);
    vec p = (((r * 0.00132186725f + 0.00967169794f) * r + 0.0555089295f) * r + 0.24022238f) * r + 0.693146856f;
    p = p * r + 1.0f;
    vec sum = 1.0f + (vec)_mm512_scalef_ps((__m512)p, whole);
    vec guess = (vec)_mm512_rcp14_ps((__m512)sum);
    return guess * (2.0f - sum * guess);
}

/* A line of 32 numbers: past the cache, which would read first what is written over, where it is whole. */
static inline void store_past_cache(uint16_t *to, __mmask32 mask, __m512i line) {
    if ((uintptr_t)to % 64 == 0 && mask == 0xffffffffu)
        _mm512_stream_si512((__m512i *)to, line);
    else
        _mm512_mask_storeu_epi16(to, mask, line);
}

/* What 32 slots have, in halves. */
struct both {
    vec half[2];
};

static inline struct both load_both(const uint16_t *from) {
    return (struct both){{load_bfloat16(from), load_bfloat16(from + SIDE)}};
}

static inline __m512i narrow_both(struct both b) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)b.half[1], (__m512)b.half[0]);
}

/* 16 units of 32 slots each, exchanged: 16 units of every slot, `stride` apart. */
static inline void store_exchanged(const __m512i of[SIDE], uint16_t *to, int64_t stride) {
    __m512i v[SIDE];
    for (int64_t i = 0; i < SIDE / 2; i++) { /* pairs of units; of 8 slots those of the first half, and of the other */
        v[i] = _mm512_unpacklo_epi16(of[2 * i], of[2 * i + 1]);
        v[i + SIDE / 2] = _mm512_unpackhi_epi16(of[2 * i], of[2 * i + 1]);
    }
    exchange(v);
    for (int64_t i = 0; i < SIDE; i++) {
        int64_t slot = i / 4 * 8 + i % 4;
        _mm256_storeu_si256((__m256i *)(to + slot * stride), _mm512_castsi512_si256(v[i]));
        _mm256_storeu_si256((__m256i *)(to + (slot + 4) * stride), _mm512_extracti64x4_epi64(v[i], 1));
    }
}

/* `count` rows of a matrix with d columns as tiles of A want them: as they lie, or, where they are fewer than 16 or do
   not end with a tile, copied to `copy` [16, d up to DEEP] with zeros behind; *stride is set. */
static inline const uint16_t *whole_rows(const uint16_t *rows, int64_t count, int64_t d, uint16_t *copy,
                                         int64_t *stride) {
    *stride = UP_TO(d, DEEP);
    if (count >= SIDE && *stride == d)
        return rows;
    memset(copy, 0, SIDE * *stride * 2);
    for (int64_t i = 0; i < count && i < SIDE; i++)
        memcpy(copy + i * *stride, rows + i * d, d * 2);
    return copy;
}

static inline void *scratch(int64_t numbers) {
    void *room = aligned_alloc(64, UP_TO(numbers * 2 + 64, 64));
    if (!room)
        abort();
    return room;
}

#endif
