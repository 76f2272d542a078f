/* Scores of a block of queries with all keys of one side, from registers: sums over c in order, whatever the blocks.

   `key_tiles.h` has the same names for processors with tiles. */

#ifndef MOESTRO_KEY_PRODUCTS_H
#define MOESTRO_KEY_PRODUCTS_H

#include "ranked.h"

#if defined(__AVX512F__)
#define VECS 4
#else
#define VECS 2
#endif
#define BLOCK 64 /* keys packed together */
#define KEYS_AT_ONCE (VECS * WIDTH)
#define QUERIES 6 /* with KEYS_AT_ONCE keys they fill the registers */
#define TOKENS 48 /* at a time, a multiple of QUERIES */

/* Keys [n, half] packed as [blocks, half, BLOCK], zeros past n. */
struct packed {
    float *keys;
    int64_t n, half;
};

static inline int64_t whole_blocks(int64_t n) { return UP(n, BLOCK); }

static inline struct packed room_for_keys(int64_t n, int64_t half) {
    struct packed room = {malloc(whole_blocks(n) * half * sizeof(float)), n, half};
    require_memory(room.keys != NULL);
    return room;
}

static inline void free_keys(struct packed *packed) { free(packed->keys); }

#if defined(__AVX512F__)
/* BLOCK keys, of which `count` are there, 16 by 16 numbers at a time. */
static inline void pack_block(const float *keys, int64_t count, int64_t half, float *packed) {
    for (int64_t first = 0; first < BLOCK; first += SIDE)
        for (int64_t c = 0; c < half; c += SIDE) {
            int64_t columns = half - c < SIDE ? half - c : SIDE;
            __mmask16 in = (__mmask16)((1u << columns) - 1);
            __m512i v[SIDE];
            for (int64_t i = 0; i < SIDE; i++)
                v[i] = first + i < count ? _mm512_maskz_loadu_epi32(in, keys + (first + i) * half + c)
                                         : _mm512_setzero_si512();
            exchange(v);
            for (int64_t i = 0; i < columns; i++)
                _mm512_storeu_si512(packed + (c + i) * BLOCK + first, v[i]);
        }
}
#else
static inline void pack_block(const float *keys, int64_t count, int64_t half, float *packed) {
    for (int64_t c = 0; c < half; c++)
        for (int64_t i = 0; i < BLOCK; i++)
            packed[c * BLOCK + i] = i < count ? keys[i * half + c] : 0;
}
#endif

static inline void pack_keys(const float *keys, struct packed *to) {
    for (int64_t first = 0; first < to->n; first += BLOCK) {
        int64_t count = to->n - first < BLOCK ? to->n - first : BLOCK;
        pack_block(keys + first * to->half, count, to->half, to->keys + first * to->half);
    }
}

static inline void products(const float *const *query, const float *packed, int64_t half, float *out, int64_t stride) {
    vec sums[QUERIES][VECS] = {0};
    for (int64_t c = 0; c < half; c++) {
        vec key[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++)
            key[v] = load(packed + c * BLOCK + v * WIDTH);
#pragma GCC unroll 8
        for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++)
                sums[q][v] += query[q][c] * key[v];
    }
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++)
            store(out + q * stride + v * WIDTH, sums[q][v]);
}

/* scores[TOKENS, stride] of `count` queries, `row` apart; past n and past `count` anything. */
static inline void score(const float *query, int64_t row, int64_t count, struct packed *packed, float *scores,
                         int64_t stride) {
    int64_t half = packed->half;
    for (int64_t first = 0; first < packed->n; first += BLOCK)
        for (int64_t t = 0; t < count; t += QUERIES) {
            const float *queries[QUERIES];
            for (int q = 0; q < QUERIES; q++) /* past the end: the last once more, and nobody reads the result */
                queries[q] = query + (t + q < count ? t + q : count - 1) * row;
            for (int64_t at = 0; at < BLOCK; at += KEYS_AT_ONCE)
                products(queries, packed->keys + first * half + at, half, scores + t * stride + first + at, stride);
        }
}

/* Twice as much as a score may be wrong by: not at all. */
static inline float doubt(const struct packed *packed, int64_t t) {
    (void)packed, (void)t;
    return 0;
}

static inline void true_scores(const struct packed *packed, const float *query, const int32_t *places, int64_t count,
                               float *to) {
    (void)packed, (void)query, (void)places, (void)count, (void)to;
}

#endif
