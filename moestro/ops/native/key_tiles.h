/* Scores of a block of queries with all keys of one side, on tiles of AMX, as exact as products of float32: every number
   is the sum of three pieces in bfloat16 (pieces.h).

   Pieces of a number that is not finite, or so great that one could overflow, would make numbers into what is none:
   scores of such queries and keys are computed in the ordinary way. `key_products.h` has the same names for processors
   without tiles. */

#ifndef MOESTRO_KEY_TILES_H
#define MOESTRO_KEY_TILES_H

#include "pieces.h"
#include "ranked.h"

#define BLOCK 32  /* keys whose products stand in tiles at a time */
#define TOKENS 32 /* at a time, in two tiles */
#define PIECES MOST_PIECES
#define STEP (PIECES * TILE)
#define GREAT 0x5b800000 /* 2^56 */

/* Keys [n, half] as tiles of B: [UP(n, BLOCK) / SIDE, deep, PIECES, TILE], zeros past n; queries likewise as tiles of A.
   Their pairs along k are (c, c + 16), which takes no shuffles. */
struct packed {
    const float *plain;
    uint16_t *keys, *queries;
    int64_t n, half, deep;
    int great; /* some key */
};

static inline int64_t whole_blocks(int64_t n) { return UP(n, BLOCK); }

static inline struct packed room_for_keys(int64_t n, int64_t half) {
    int64_t deep = UP(half, DEEP) / DEEP, bytes = PIECES * DEEP * deep * sizeof(uint16_t);
    return (struct packed){NULL, aligned_alloc(64, whole_blocks(n) * bytes), aligned_alloc(64, TOKENS * bytes), n, half,
                           deep, 0};
}

static inline void free_keys(struct packed *packed) { free(packed->keys), free(packed->queries); }

static inline __mmask16 first_lanes(int64_t count) {
    return count >= SIDE ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Numbers first..first+15 of a row of `half`, zeros past its end, or none of it; `most` is the greatest size so far. */
ALWAYS __m512i part_of(const float *row, int64_t first, int64_t half, int there, __m512i *most) {
    __mmask16 in = there ? first_lanes(half - first) : 0;
    __m512i bits = _mm512_maskz_loadu_epi32(in, row + (in ? first : 0));
    *most = _mm512_max_epu32(*most, _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX)));
    return bits;
}

static inline int is_great(__m512i bits) {
    return _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(GREAT)) != 0;
}

/* A row of a tile of every piece. */
ALWAYS void store_pieces(__m512i low, __m512i high, uint16_t *row) {
    __m512i piece[PIECES];
    split((__m512)low, (__m512)high, PIECES, piece);
    for (int p = 0; p < PIECES; p++)
        _mm512_store_si512(row + p * TILE, piece[p]);
}

/* DEEP numbers, wherever they are: also past the end. */
PREFETCHING ask_for(const float *numbers) {
    _mm_prefetch((const char *)numbers, _MM_HINT_T0);
    _mm_prefetch((const char *)(numbers + SIDE), _MM_HINT_T0);
}

static inline void pack_keys(const float *keys, struct packed *to) {
    int64_t half = to->half;
    __m512i most = _mm512_setzero_si512();
    for (int64_t first = 0; first < whole_blocks(to->n); first += SIDE)
        for (int64_t k = 0; k < to->deep; k++) {
            __m512i low[SIDE], high[SIDE];
            for (int64_t i = 0; i < SIDE; i++) {
                int there = first + i < to->n;
                const float *row = keys + (there ? (first + i) * half : 0);
                ask_for(row + SIDE * half + k * DEEP);
                low[i] = part_of(row, k * DEEP, half, there, &most);
                high[i] = part_of(row, k * DEEP + SIDE, half, there, &most);
            }
            exchange(low), exchange(high);
            for (int64_t i = 0; i < SIDE; i++)
                store_pieces(low[i], high[i], to->keys + (first / SIDE * to->deep + k) * STEP + i * DEEP);
        }
    to->plain = keys;
    to->great = is_great(most);
}

/* Which of the queries have great numbers. */
static inline uint32_t pack_queries(const float *query, int64_t row, int64_t count, const struct packed *to) {
    uint32_t great = 0;
    for (int64_t t = 0; t < TOKENS; t++) {
        __m512i most = _mm512_setzero_si512();
        const float *from = query + (t < count ? t * row : 0);
        for (int64_t k = 0; k < to->deep; k++) {
            ask_for(from + TOKENS * row + k * DEEP);
            __m512i low = part_of(from, k * DEEP, to->half, t < count, &most);
            __m512i high = part_of(from, k * DEEP + SIDE, to->half, t < count, &most);
            store_pieces(low, high, to->queries + (t / SIDE * to->deep + k) * STEP + t % SIDE * DEEP);
        }
        great |= (uint32_t)is_great(most) << t;
    }
    return great;
}

/* TOKENS queries with BLOCK keys. */
static inline void multiply(const uint16_t *queries, const uint16_t *keys, int64_t deep, float *out, int64_t stride) {
    const struct left a = {queries, queries + deep * STEP, DEEP, STEP};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    multiply_along(&a, keys, keys + deep * STEP, deep, PIECES, NULL);
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + SIDE, stride * 4);
    _tile_stored(2, out + SIDE * stride, stride * 4);
    _tile_stored(3, out + SIDE * stride + SIDE, stride * 4);
}

/* scores[TOKENS, stride] of `count` queries, `row` apart; past n and past `count` anything. */
static inline void score(const float *query, int64_t row, int64_t count, const struct packed *packed, float *scores,
                         int64_t stride) {
    use_tiles(); /* cheap, and whatever ran on this thread before may have used them otherwise */
    uint32_t great = pack_queries(query, row, count, packed);
    if (packed->great)
        great = UINT32_MAX;
    else
        for (int64_t first = 0; first < packed->n; first += BLOCK)
            multiply(packed->queries, packed->keys + first / SIDE * packed->deep * STEP, packed->deep, scores + first,
                     stride);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; great >> t & 1 && i < packed->n; i++)
            scores[t * stride + i] = dot_float32(packed->plain + i * packed->half, query + t * row, packed->half);
}

#endif
