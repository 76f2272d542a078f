/* Numbers of float32 or bfloat16, 32 at a time, between memory and tiles. */

#ifndef MOESTRO_TILE_NUMBERS_H
#define MOESTRO_TILE_NUMBERS_H

#include "tiles.h"

static inline __mmask32 first_columns(int64_t count) {
    return count >= DEEP ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

/* 32 numbers, in halves. */
struct both {
    vec half[2];
};

static inline struct both both_at(const float *left, const float *right) {
    return (struct both){{load(left), load(right)}};
}

static inline struct both load_both(const struct tiles *f, const void *from, __mmask32 mask) {
    if (!f->narrow)
        return (struct both){{(vec)_mm512_maskz_loadu_ps((__mmask16)mask, from),
                              (vec)_mm512_maskz_loadu_ps((__mmask16)(mask >> SIDE), (const float *)from + SIDE)}};
    __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
    return (struct both){{(vec)_mm512_slli_epi32(low, 16), (vec)_mm512_slli_epi32(high, 16)}};
}

static inline __m512i narrow_both(struct both b) {
#ifdef __AVX512BF16__
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)b.half[1], (__m512)b.half[0]);
#else
    uint16_t bits[DEEP];
    store_bfloat16(bits, b.half[0]), store_bfloat16(bits + SIDE, b.half[1]);
    return _mm512_loadu_si512(bits);
#endif
}

static inline void store_both(const struct tiles *f, void *to, __mmask32 mask, struct both b) {
    if (f->narrow)
        _mm512_mask_storeu_epi16(to, mask, narrow_both(b));
    else {
        _mm512_mask_storeu_ps(to, (__mmask16)mask, (__m512)b.half[0]);
        _mm512_mask_storeu_ps((float *)to + SIDE, (__mmask16)(mask >> SIDE), (__m512)b.half[1]);
    }
}

/* Past the cache, which would read first what is written over, where lines are whole. */
static inline void store_past_cache(const struct tiles *f, void *to, __mmask32 mask, struct both b) {
    if ((uintptr_t)to % 64 || mask != 0xffffffffu)
        store_both(f, to, mask, b);
    else if (f->narrow)
        _mm512_stream_si512(to, narrow_both(b));
    else {
        _mm512_stream_ps(to, (__m512)b.half[0]);
        _mm512_stream_ps((float *)to + SIDE, (__m512)b.half[1]);
    }
}

/* 1 / (1 + e^-z), to 2^-17 of itself: what is made of it is rounded to bfloat16. */
static inline vec rough_sigmoid(vec z) {
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

/* The same to two units in the last place, and 0 where it is less than any number. */
static inline vec exact_sigmoid(vec z) {
    const __m512 most = _mm512_set1_ps(140.0f);
    vec x = (vec)_mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, (__m512)-z));
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504088896f), 8);
    vec e = (vec)_mm512_scalef_ps((__m512)exponential_near_0((x - n * 0.693359375f) + n * 2.12194440e-4f), (__m512)n);
    return 1.0f / (1.0f + e);
}

static inline vec sigmoid(const struct tiles *f, vec z) { return f->narrow ? rough_sigmoid(z) : exact_sigmoid(z); }

/* Runs a function with the number of pieces known when it is compiled, which keeps pieces in registers. */
#define BY_PIECES(f, call)                                                                                             \
    do {                                                                                                               \
        if ((f)->pieces == MOST_PIECES)                                                                                \
            call(MOST_PIECES);                                                                                         \
        else if ((f)->pieces == 2)                                                                                     \
            call(2);                                                                                                   \
        else                                                                                                           \
            call(1);                                                                                                   \
    } while (0)

ALWAYS void store_split(vec low, vec high, int64_t pieces, uint16_t *to) {
    __m512i v[MOST_PIECES];
    split((__m512)low, (__m512)high, pieces, v);
    for (int64_t i = 0; i < pieces; i++)
        _mm512_storeu_si512(to + i * TILE, v[i]);
}

/* The pieces of 16 pairs, each to its own tile, of which `to` is a row. */
ALWAYS void store_pieces(const struct tiles *f, vec low, vec high, uint16_t *to) {
#define STORE(pieces) store_split(low, high, pieces, to)
    BY_PIECES(f, STORE);
#undef STORE
}

ALWAYS void across_pieces(const struct tiles *f, const void *const rows[SIDE], int64_t column, int64_t pieces,
                          uint16_t *to) {
    __mmask32 mask = first_columns(f->d - column);
    __m512i v[MOST_PIECES][SIDE], one[MOST_PIECES];
    for (int64_t i = 0; i < SIDE; i++) {
        struct both b = load_both(f, rows[i] ? number(f, rows[i], column) : NULL, rows[i] ? mask : 0);
        split((__m512)b.half[0], (__m512)b.half[1], pieces, one);
        for (int64_t p = 0; p < pieces; p++)
            v[p][i] = one[p];
    }
    for (int64_t p = 0; p < pieces; p++) {
        exchange(v[p]);
        for (int64_t i = 0; i < SIDE; i++)
            _mm512_storeu_si512(to + p * TILE + i * DEEP, v[p][i]);
    }
}

/* 32 columns of 16 rows, of which some may be missing, as a tile of B paired along the columns. */
static inline void across(const struct tiles *f, const void *const rows[SIDE], int64_t column, uint16_t *to) {
#define ACROSS(pieces) across_pieces(f, rows, column, pieces, to)
    if (!f->narrow) {
        BY_PIECES(f, ACROSS);
        return;
    }
#undef ACROSS
    __mmask32 mask = first_columns(f->d - column);
    __m512i v[SIDE];
    for (int64_t i = 0; i < SIDE; i++)
        v[i] = rows[i] ? _mm512_maskz_loadu_epi16(mask, number(f, rows[i], column)) : _mm512_setzero_si512();
    exchange(v);
    for (int64_t i = 0; i < SIDE; i++)
        _mm512_storeu_si512(to + i * DEEP, v[i]);
}

/* 32 columns of two rows, paired, to one row of each of two tiles of B; a row may be missing. */
static inline void pair(const struct tiles *f, const void *even, const void *odd, int64_t column, uint16_t *left,
                        uint16_t *right) {
    __mmask32 mask = first_columns(f->d - column);
    const void *one = even ? number(f, even, column) : NULL, *two = odd ? number(f, odd, column) : NULL;
    if (!f->narrow) {
        struct both low = load_both(f, one, one ? mask : 0), high = load_both(f, two, two ? mask : 0);
        store_pieces(f, low.half[0], high.half[0], left);
        store_pieces(f, low.half[1], high.half[1], right);
        return;
    }
    __m512i low = one ? _mm512_maskz_loadu_epi16(mask, one) : _mm512_setzero_si512();
    __m512i high = two ? _mm512_maskz_loadu_epi16(mask, two) : _mm512_setzero_si512();
    __m512i a = _mm512_unpacklo_epi16(low, high), b = _mm512_unpackhi_epi16(low, high);
    /* the quarters of a and b in turn: 0a 0b 1a 1b, 2a 2b 3a 3b */
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(left, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi64(a, second, b));
}

/* 16 units of 32 slots, in bfloat16, exchanged: 16 units of every slot, `stride` apart. */
static inline void exchange_narrow(const struct both of[SIDE], uint16_t *to, int64_t stride) {
    __m512i v[SIDE];
    for (int64_t i = 0; i < SIDE / 2; i++) { /* pairs of units; of 8 slots those of the first half, and of the other */
        __m512i even = narrow_both(of[2 * i]), odd = narrow_both(of[2 * i + 1]);
        v[i] = _mm512_unpacklo_epi16(even, odd);
        v[i + SIDE / 2] = _mm512_unpackhi_epi16(even, odd);
    }
    exchange(v);
    for (int64_t i = 0; i < SIDE; i++) {
        int64_t slot = i / 4 * 8 + i % 4;
        _mm256_storeu_si256((__m256i *)(to + slot * stride), _mm512_castsi512_si256(v[i]));
        _mm256_storeu_si256((__m256i *)(to + (slot + 4) * stride), _mm512_extracti64x4_epi64(v[i], 1));
    }
}

/* The same in pieces, to a half of the tiles at `top` and `bottom`. */
ALWAYS void exchange_pieces(const struct both of[SIDE], int64_t pieces, uint16_t *top, uint16_t *bottom) {
    __m512i v[MOST_PIECES][SIDE], one[MOST_PIECES];
    for (int64_t i = 0; i < SIDE; i++) { /* pairs of units of 16 slots, and of the other 16 */
        int64_t even = i % 8 * 2, half = i / 8;
        split((__m512)of[even].half[half], (__m512)of[even + 1].half[half], pieces, one);
        for (int64_t p = 0; p < pieces; p++)
            v[p][i] = one[p];
    }
    for (int64_t p = 0; p < pieces; p++) {
        exchange(v[p]);
        for (int64_t i = 0; i < SIDE; i++) {
            int64_t at = p * TILE + i * DEEP;
            _mm256_storeu_si256((__m256i *)(top + at), _mm512_castsi512_si256(v[p][i]));
            _mm256_storeu_si256((__m256i *)(bottom + at), _mm512_extracti64x4_epi64(v[p][i], 1));
        }
    }
}

/* 16 units of 32 slots, from `slot` and `unit` on, to what `left_of` takes rows from. */
static inline void store_exchanged(const struct tiles *f, const struct both of[SIDE], uint16_t *to, int64_t slot,
                                   int64_t unit, int64_t stride, int64_t deep) {
    struct left a = from_tile(left_of(f, to, slot, stride, deep), unit / DEEP);
    uint16_t *top = (uint16_t *)a.top + unit % DEEP, *bottom = (uint16_t *)a.bottom + unit % DEEP;
#define EXCHANGE(pieces) exchange_pieces(of, pieces, top, bottom)
    if (f->narrow)
        exchange_narrow(of, top, stride);
    else
        BY_PIECES(f, EXCHANGE);
#undef EXCHANGE
}

/* 32 slots of a unit, to what `left_of` takes units from. */
static inline void store_unit(const struct tiles *f, struct both b, uint16_t *to, int64_t unit, int64_t slot,
                              int64_t stride, int64_t deep) {
    if (f->narrow)
        _mm512_storeu_si512(to + unit * stride + slot, narrow_both(b));
    else
        store_pieces(f, b.half[0], b.half[1],
                     to + (unit / SIDE * deep + slot / DEEP) * tile_of(f) + unit % SIDE * DEEP);
}

/* 16 rows of a weight, of which `count` are there, as a left half of tiles of A wants them: narrow ones as they lie, or,
   where they are fewer or do not end with a tile, copied to `copy` [16, d up to DEEP] with zeros behind; others to
   `copy` in pieces. */
static inline const uint16_t *weight_rows(const struct tiles *f, const void *rows, int64_t count, uint16_t *copy) {
    int64_t wide = UP_TO(f->d, DEEP);
    if (f->narrow && count >= SIDE && wide == f->d)
        return rows;
    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t column = 0; column < wide; column += DEEP) {
            __mmask32 mask = i < count ? first_columns(f->d - column) : 0;
            const void *from = number(f, rows, i * f->d + column);
            if (f->narrow)
                _mm512_storeu_si512(copy + i * wide + column, _mm512_maskz_loadu_epi16(mask, from));
            else {
                struct both b = load_both(f, from, mask);
                store_pieces(f, b.half[0], b.half[1], copy + column / DEEP * tile_of(f) + i * DEEP);
            }
        }
    return copy;
}

/* Two times 16 rows of a weight; `copy` is room for them. */
static inline struct left weights(const struct tiles *f, const void *top, int64_t top_count, const void *bottom,
                                  int64_t bottom_count, uint16_t *copy) {
    int64_t wide = UP_TO(f->d, DEEP);
    const uint16_t *one = weight_rows(f, top, top_count, copy);
    const uint16_t *two = weight_rows(f, bottom, bottom_count, copy + SIDE * wide * f->pieces);
    return (struct left){one, two, f->narrow ? wide : DEEP, f->narrow ? DEEP : tile_of(f)};
}

#endif
