/* Scores of a block of queries with all keys of one side, where the processor multiplies bfloat16: on tiles of AMX or
   from registers.

   Many keys: of numbers rounded to bfloat16, with a bound on what that changes, |q.k - q1.k1| <= |q - q1| |k| + |q1| |k - k1|
   and rounding of sums. Only the few keys that could be among the best by it have their true scores computed. Few keys:
   of numbers in all their pieces (pieces.h), as exact as products of float32. Where pieces are rounded, scores with
   numbers so great, or so small, that this does not hold are computed in the ordinary way.

   `key_products.h` has the same names for processors that know float32 only. */

#ifndef MOESTRO_KEY_TILES_H
#define MOESTRO_KEY_TILES_H

#include <math.h>

#include "ranked.h"

#define BLOCK 32  /* keys whose products stand in tiles at a time */
#define TOKENS 32 /* at a time, in two tiles */
/* Keys from which on they are rounded first: three pieces are six products, numbers as they are two. */
#define MANY (MOST_PIECES == 3 ? 384 : 192)
/* Whether products are those of float32. */
#define AS_THEY_ARE(pieces) (MOST_PIECES == 2 && (pieces) == 2)

/* Squares of lengths; squares of what was rounded off. */
struct lengths {
    float whole, rounded;
};

/* Keys [n, half] as tiles of B: [UP(n, BLOCK) / SIDE, deep, pieces, TILE], zeros past n; queries likewise as tiles of A.
   Their pairs along k are (c, c + 16), which takes no shuffles. */
struct packed {
    const float *plain;
    uint16_t *keys, *queries;
    int64_t n, half, deep, pieces;
    struct lengths most, query[TOKENS]; /* of all keys; of each query */
};

static inline int64_t whole_blocks(int64_t n) { return UP(n, BLOCK); }

static inline struct packed room_for_keys(int64_t n, int64_t half) {
    int64_t deep = UP(half, DEEP) / DEEP, pieces = n < MANY ? MOST_PIECES : 1;
    int64_t bytes = pieces * DEEP * deep * sizeof(uint16_t);
    struct packed room = {.keys = aligned_alloc(64, whole_blocks(n) * bytes),
                          .queries = aligned_alloc(64, TOKENS * bytes), .n = n, .half = half, .deep = deep,
                          .pieces = pieces};
    require_memory(room.keys && room.queries);
    return room;
}

static inline void free_keys(struct packed *packed) { free(packed->keys), free(packed->queries); }

static inline __mmask16 first_lanes(int64_t count) {
    return count >= SIDE ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Numbers first..first+15 of a row of `half`, zeros past its end, or none of it. */
ALWAYS __m512 part_of(const float *row, int64_t first, int64_t half, int there) {
    __mmask16 in = there ? first_lanes(half - first) : 0;
    return _mm512_maskz_loadu_ps(in, row + (in ? first : 0));
}

/* Squares of 16 numbers, and of what is rounded off, are added to those of others. */
ALWAYS void add_squares(__m512 x, __m512 *whole, __m512 *rest) {
    *whole = _mm512_fmadd_ps(x, x, *whole);
    next_piece(&x);
    *rest = _mm512_fmadd_ps(x, x, *rest);
}

/* A row of a tile of every piece. */
ALWAYS void store_pieces(__m512 low, __m512 high, int64_t pieces, uint16_t *row, __m512 *whole, __m512 *rest) {
    __m512i piece[MOST_PIECES];
    if (!AS_THEY_ARE(pieces))
        add_squares(low, whole, rest), add_squares(high, whole, rest);
    split(low, high, pieces, piece);
    for (int p = 0; p < pieces; p++)
        _mm512_store_si512(row + p * TILE, piece[p]);
}

/* What is not a number is more than infinity. */
static inline float greatest(__m512 squares) {
    int32_t bits = _mm512_reduce_max_epi32(_mm512_and_si512((__m512i)squares, _mm512_set1_epi32(INT32_MAX)));
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* DEEP numbers, wherever they are: also past the end. */
PREFETCHING ask_for(const float *numbers) {
    _mm_prefetch((const char *)numbers, _MM_HINT_T1);
    _mm_prefetch((const char *)(numbers + SIDE), _MM_HINT_T1);
}

ALWAYS void pack_keys_as(const float *keys, int64_t pieces, struct packed *to) {
    int64_t half = to->half;
    __m512i whole = _mm512_setzero_si512(), rest = whole;
    for (int64_t first = 0; first < whole_blocks(to->n); first += SIDE) {
        __m512 squares = _mm512_setzero_ps(), left = squares;
        for (int64_t k = 0; k < to->deep; k++) {
            __m512i low[SIDE], high[SIDE];
            for (int64_t i = 0; i < SIDE; i++) {
                int there = first + i < to->n;
                const float *row = keys + (there ? (first + i) * half : 0);
                ask_for(row + SIDE * half + k * DEEP);
                low[i] = (__m512i)part_of(row, k * DEEP, half, there);
                high[i] = (__m512i)part_of(row, k * DEEP + SIDE, half, there);
            }
            exchange(low), exchange(high);
            uint16_t *tile = to->keys + (first / SIDE * to->deep + k) * pieces * TILE;
            for (int64_t i = 0; i < SIDE; i++)
                store_pieces((__m512)low[i], (__m512)high[i], pieces, tile + i * DEEP, &squares, &left);
        }
        whole = _mm512_max_epu32(whole, (__m512i)squares), rest = _mm512_max_epu32(rest, (__m512i)left);
    }
    to->plain = keys;
    to->most = (struct lengths){greatest((__m512)whole), greatest((__m512)rest)};
}

static inline void pack_keys(const float *keys, struct packed *to) {
    if (to->pieces == 1)
        pack_keys_as(keys, 1, to);
    else
        pack_keys_as(keys, MOST_PIECES, to);
}

ALWAYS void pack_queries_as(const float *query, int64_t row, int64_t count, int64_t pieces, struct packed *to) {
    for (int64_t t = 0; t < TOKENS; t++) {
        __m512 squares = _mm512_setzero_ps(), left = squares;
        const float *from = query + (t < count ? t * row : 0);
        for (int64_t k = 0; k < to->deep; k++) {
            ask_for(from + TOKENS * row + k * DEEP);
            __m512 low = part_of(from, k * DEEP, to->half, t < count);
            __m512 high = part_of(from, k * DEEP + SIDE, to->half, t < count);
            uint16_t *tile = to->queries + (t / SIDE * to->deep + k) * pieces * TILE;
            store_pieces(low, high, pieces, tile + t % SIDE * DEEP, &squares, &left);
        }
        to->query[t] = (struct lengths){_mm512_reduce_add_ps(squares), _mm512_reduce_add_ps(left)};
    }
}

static inline void pack_queries(const float *query, int64_t row, int64_t count, struct packed *to) {
    if (to->pieces == 1)
        pack_queries_as(query, row, count, 1, to);
    else
        pack_queries_as(query, row, count, MOST_PIECES, to);
}

/* Of lengths whose squares and products are numbers of full precision. */
static inline int is_usual(struct lengths of) { return of.whole > 0x1p-60f && of.whole < 0x1p120f; }

/* Twice as much as a score may be wrong by; where that cannot be said, more than any. */
static inline float doubt(const struct packed *packed, int64_t t) {
    struct lengths query = packed->query[t], keys = packed->most;
    if (AS_THEY_ARE(packed->pieces))
        return 0;
    if (!is_usual(query) || !is_usual(keys))
        return __builtin_inff();
    if (packed->pieces == MOST_PIECES)
        return 0;
    float q = sqrtf(query.whole), k = sqrtf(keys.whole), q_off = sqrtf(query.rounded), k_off = sqrtf(keys.rounded);
    return 2.002f * (q_off * k + (q + q_off) * k_off) + (packed->half + 32) * 0x1p-21f * q * k;
}

/* TOKENS queries, of which `count` are there, with BLOCK keys. */
ALWAYS void multiply_keys(const struct packed *packed, const uint16_t *keys, int64_t pieces, int64_t count, float *out,
                          int64_t stride) {
    int64_t tall = packed->deep * pieces * TILE;
    const struct left queries = {packed->queries, packed->queries + tall, DEEP, pieces * TILE};
    product_in_rows(&queries, keys, keys + tall, packed->deep, pieces, count, out, stride);
}

/* scores[TOKENS, stride] of `count` queries, `row` apart; past n and past `count` anything. */
static inline void score(const float *query, int64_t row, int64_t count, struct packed *packed, float *scores,
                         int64_t stride) {
    use_tiles(); /* cheap, and whatever ran on this thread before may have used them otherwise */
    pack_queries(query, row, count, packed);
    for (int64_t first = 0; first < packed->n; first += BLOCK) {
        const uint16_t *keys = packed->keys + first * packed->deep * packed->pieces * DEEP;
        if (packed->pieces == 1)
            multiply_keys(packed, keys, 1, count, scores + first, stride);
        else
            multiply_keys(packed, keys, MOST_PIECES, count, scores + first, stride);
    }
}

#define TOGETHER 4

/* Products of one query with TOGETHER keys, each as 16 sums. */
ALWAYS void true_products(const float *query, const float *const *key, int64_t half, __m512i *to) {
    __m512 sums[TOGETHER];
    int64_t c = half / SIDE * SIDE;
    __mmask16 in = first_lanes(half - c);
    __m512 x = _mm512_maskz_loadu_ps(in, query + c);
    for (int i = 0; i < TOGETHER; i++)
        sums[i] = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(in, key[i] + c));
    for (c = 0; c + SIDE <= half; c += SIDE) {
        x = _mm512_loadu_ps(query + c);
        for (int i = 0; i < TOGETHER; i++)
            sums[i] = _mm512_fmadd_ps(x, _mm512_loadu_ps(key[i] + c), sums[i]);
    }
    for (int i = 0; i < TOGETHER; i++)
        to[i] = (__m512i)sums[i];
}

/* Products of one query with some keys; `to` has room for SIDE more. */
static inline void true_scores(const struct packed *packed, const float *query, const int32_t *places, int64_t count,
                               float *to) {
    for (int64_t first = 0; first < count; first += SIDE) {
        __m512i sums[SIDE];
        for (int64_t i = 0; i < SIDE; i += TOGETHER) {
            const float *key[TOGETHER];
            for (int64_t j = 0; j < TOGETHER; j++) /* past the end: one of them once more */
                key[j] = packed->plain + places[first + i + j < count ? first + i + j : first] * packed->half;
            true_products(query, key, packed->half, sums + i);
        }
        exchange(sums);
        for (int64_t step = SIDE / 2; step; step /= 2)
            for (int64_t i = 0; i < step; i++)
                sums[i] = (__m512i)_mm512_add_ps((__m512)sums[i], (__m512)sums[i + step]);
        _mm512_storeu_ps(to + first, (__m512)sums[0]);
    }
}

#endif
