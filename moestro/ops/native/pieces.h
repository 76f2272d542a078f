/* Products of matrices in tiles: 16 rows of 64 bytes, sums in float32. On tiles of AMX (`amx.h`), which multiply bfloat16
   only, numbers of float32 are taken as sums of pieces in bfloat16; from registers (`registers.h`) as they are.

   C[m, n] += sum over k of A[m, k] * B[k, n]. A tile of A is 16 rows of 32 numbers along k; one of B is 16 pairs of k,
   each with 16 columns of two numbers ("paired"). Which k make a pair is free, as long as A and B agree. Tiles follow
   each other along k; where a number has several pieces, so do its tiles: first pieces, second, third. A number of
   float32 that is taken as it is fills the place of two pieces: the first numbers of 16 pairs, then the second.

   x = x1 + x2 + x3, of 8 bits each, is exact. Of the nine products of pieces the six largest are summed; what is left
   out is below 2^-23 of |x||y|, and of either sign, because pieces are rounded and not cut off (Henry, Tang, Heinecke
   2019, arXiv:1904.06376). Two pieces, and three products, are good to 2^-16; one is x rounded to bfloat16. What is not a
   number stays so. Infinities, and what is within 2^-9 of the largest number, become no numbers; pieces below 2^-126
   are 0. */

#ifndef MOESTRO_PIECES_H
#define MOESTRO_PIECES_H

#include <immintrin.h>

#include "soon.h"
#include "vector.h"

#define SIDE 16                 /* rows or columns of a tile of C */
#define DEEP 32                 /* numbers along k of a tile */
#define TILE (DEEP * SIDE)      /* numbers of a tile of A or B */
#ifdef __AMX_BF16__
#define MOST_PIECES 3
#else
#define MOST_PIECES 2
#endif
#define UP_TO(n, step) (((n) + (step) - 1) / (step) * (step))
#define ALWAYS static inline __attribute__((always_inline))

/* The next piece of 16 numbers, in the upper halves, and what is left of them. */
ALWAYS __m512i next_piece(__m512 *x) {
    __m512i bits = _mm512_add_epi32(_mm512_castps_si512(*x), _mm512_set1_epi32(0x8000));
    bits = _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000));
    *x = _mm512_sub_ps(*x, _mm512_castsi512_ps(bits));
    return bits;
}

/* The last of fewer than three, which has to say by itself what is not a number. */
ALWAYS __m512i last_piece(__m512 x) {
    __mmask16 wrong = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(next_piece(&x), wrong, _mm512_set1_epi32(0x7fc00000));
}

/* Two vectors of 16 numbers, as pairs: of every pair the one of `low` comes first. */
ALWAYS __m512i paired_halves(__m512i low, __m512i high) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xaaaaaaaau, high);
}

/* The pieces of 16 pairs, of which `low` has the first and `high` the second numbers. */
ALWAYS void split(__m512 low, __m512 high, int64_t pieces, __m512i to[MOST_PIECES]) {
#ifdef __AMX_BF16__
    for (int64_t i = 0; i + 1 < pieces; i++) {
        __m512i first = next_piece(&low);
        to[i] = paired_halves(first, next_piece(&high));
    }
    if (pieces == MOST_PIECES) { /* 8 bits are left */
        to[2] = paired_halves(_mm512_castps_si512(low), _mm512_castps_si512(high));
        return;
    }
#else
    if (pieces == 2) {
        to[0] = _mm512_castps_si512(low), to[1] = _mm512_castps_si512(high);
        return;
    }
#endif
    to[pieces - 1] = paired_halves(last_piece(low), last_piece(high));
}

/* 32 rows of A: where the first and the last 16 begin, and numbers from row to row and from tile to tile along k. */
struct left {
    const uint16_t *top, *bottom;
    int64_t stride, step;
};

/* What there is of a product: rows of A, columns of B, and of the last tile of k so many pairs of each piece. The rest of
   A and B is zeros, of whose products none has to be computed. */
struct extent {
    int64_t rows, columns, pairs[MOST_PIECES];
};

#define WHOLE ((struct extent){2 * SIDE, 2 * SIDE, {SIDE, SIDE}})

/* 16 x 16 numbers of 32 bits, rows and columns exchanged. */
ALWAYS void exchange(__m512i v[SIDE]) {
    __m512i a[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < SIDE; j += 8) {
            a[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
            a[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "registers.h"
#endif

#endif
