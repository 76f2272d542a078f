/* Scores of a block of queries with all keys of one side, on tiles of AMX, as exact as products of float32.

   A number is the sum of three in bfloat16, and of the nine products of two numbers the six greatest are added up, in
   float32, smaller ones first: what is left out is 2^-24 of the product (Henry 2019, arXiv:1904.06376). Along k a tile
   has the pairs (c, c + 16), which spares the pieces every shuffle. Numbers that are not finite, or so great that a
   piece could overflow, have their scores computed in the ordinary way: with pieces, infinity times 1 would be NaN.

   `key_products.h` has the same names for processors without tiles. */

#ifndef MOESTRO_KEY_TILES_H
#define MOESTRO_KEY_TILES_H

#include "ranked.h"
#include "tiles.h"

#define BLOCK 32  /* keys whose products stand in tiles at a time */
#define TOKENS 32 /* at a time, in two tiles */
#define PIECES 3
#define GREAT 0x5b800000 /* 2^56 */

/* Keys [n, half] as tiles of B: [UP(n, BLOCK) / BLOCK, deep, PIECES, BLOCK / SIDE, TILE], zeros past n; queries as
   tiles of A: [deep, PIECES, TOKENS / SIDE, TILE]. */
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

/* The pieces of 16 numbers and of 16 others, in pairs. What is taken away is exact, so nothing is left at the end. */
static inline void split(__m512 a, __m512 b, __m512i piece[PIECES]) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int32_t)0xffff0000);
#pragma GCC unroll 3
    for (int i = 0; i < PIECES; i++) {
        __m512i low = _mm512_and_si512(_mm512_add_epi32((__m512i)a, half), upper);
        __m512i high = _mm512_and_si512(_mm512_add_epi32((__m512i)b, half), upper);
        piece[i] = _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
        a = _mm512_sub_ps(a, (__m512)low);
        b = _mm512_sub_ps(b, (__m512)high);
    }
}

static inline __mmask16 first_lanes(int64_t count) {
    return count >= SIDE ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static inline __m512i greatest(__m512i so_far, __m512i bits) {
    return _mm512_max_epu32(so_far, _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX)));
}

static inline int is_great(__m512i bits) {
    return _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(GREAT)) != 0;
}

static inline void pack_keys(const float *keys, struct packed *to) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t first = 0; first < whole_blocks(to->n); first += SIDE)
        for (int64_t k = 0; k < to->deep; k++) {
            __m512i halves[2][SIDE];
            for (int side = 0; side < 2; side++) {
                int64_t column = k * DEEP + side * SIDE;
                __mmask16 mask = first_lanes(to->half - column);
                for (int64_t i = 0; i < SIDE; i++) {
                    __mmask16 in = first + i < to->n ? mask : 0;
                    halves[side][i] = _mm512_maskz_loadu_epi32(in, keys + (in ? (first + i) * to->half + column : 0));
                    most = greatest(most, halves[side][i]);
                }
                exchange(halves[side]);
            }
            uint16_t *tiles = to->keys + (first / BLOCK * to->deep + k) * PIECES * BLOCK * DEEP + first % BLOCK * DEEP;
            for (int64_t i = 0; i < SIDE; i++) {
                __m512i piece[PIECES];
                split((__m512)halves[0][i], (__m512)halves[1][i], piece);
                for (int p = 0; p < PIECES; p++)
                    _mm512_store_si512(tiles + p * BLOCK * DEEP + i * DEEP, piece[p]);
            }
        }
    to->plain = keys;
    to->great = is_great(most);
}

/* Which of the queries have great numbers. */
static inline uint32_t pack_queries(const float *query, int64_t row, int64_t count, const struct packed *to) {
    uint32_t great = 0;
    for (int64_t t = 0; t < TOKENS; t++) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t k = 0; k < to->deep; k++) {
            __m512i piece[PIECES], halves[2];
            for (int side = 0; side < 2; side++) {
                int64_t column = k * DEEP + side * SIDE;
                __mmask16 in = t < count ? first_lanes(to->half - column) : 0;
                halves[side] = _mm512_maskz_loadu_epi32(in, query + (in ? t * row + column : 0));
                most = greatest(most, halves[side]);
            }
            split((__m512)halves[0], (__m512)halves[1], piece);
            for (int p = 0; p < PIECES; p++)
                _mm512_store_si512(to->queries + (k * PIECES + p) * TOKENS * DEEP + t * DEEP, piece[p]);
        }
        great |= (uint32_t)is_great(most) << t;
    }
    return great;
}

/* Tiles 4 and 5, or 6 and 7, are two of the same piece side by side. */
#define LOAD_QUERIES(piece)                                                                                            \
    _tile_loadd(4, queries + (piece) * TOKENS * DEEP, 64);                                                             \
    _tile_loadd(5, queries + (piece) * TOKENS * DEEP + TILE, 64)
#define LOAD_KEYS(piece)                                                                                               \
    _tile_loadd(6, keys + (piece) * BLOCK * DEEP, 64);                                                                 \
    _tile_loadd(7, keys + (piece) * BLOCK * DEEP + TILE, 64)
#define MULTIPLY(step)                                                                                                 \
    ask_for(keys + PIECES * BLOCK * DEEP + (step) * 16 * DEEP);                                                            \
    _tile_dpbf16ps(0, 4, 6);                                                                                           \
    _tile_dpbf16ps(1, 4, 7);                                                                                           \
    _tile_dpbf16ps(2, 5, 6);                                                                                           \
    _tile_dpbf16ps(3, 5, 7)

PREFETCHING ask_for(const uint16_t *from) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        _mm_prefetch((const char *)(from + i * DEEP), _MM_HINT_T0);
}

/* TOKENS queries with BLOCK keys. */
static inline void multiply(const uint16_t *queries, const uint16_t *keys, int64_t deep, float *out, int64_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < deep; k++) {
        LOAD_QUERIES(0);
        LOAD_KEYS(2);
        MULTIPLY(0);
        LOAD_KEYS(1);
        MULTIPLY(1);
        LOAD_QUERIES(1);
        MULTIPLY(2);
        LOAD_KEYS(0);
        MULTIPLY(3);
        LOAD_QUERIES(2);
        MULTIPLY(4);
        LOAD_QUERIES(0);
        MULTIPLY(5);
        queries += PIECES * TOKENS * DEEP, keys += PIECES * BLOCK * DEEP;
    }
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
            multiply(packed->queries, packed->keys + first * packed->deep * PIECES * DEEP, packed->deep, scores + first,
                     stride);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; great >> t & 1 && i < packed->n; i++)
            scores[t * stride + i] = dot_float32(packed->plain + i * packed->half, query + t * row, packed->half);
}

#endif
