/* Products of tiles from registers of AVX-512. `amx.h` has the same names for processors with tiles. */

#ifndef MOESTRO_REGISTERS_H
#define MOESTRO_REGISTERS_H

#define ROWS 8 /* of A, whose sums with 32 columns of B fill half of the registers: fewer loads than products */

static inline void use_tiles(void) {}
static inline void release_tiles(void) {}

/* sum + a * b, of 16 numbers of float32, or of 16 pairs of bfloat16 whose products are added. */
ALWAYS __m512 with_product(__m512 sum, __m512i a, __m512i b, int64_t pieces) {
    if (pieces == 2)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), second = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    sum = _mm512_fmadd_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(second, _mm512_castsi512_ps(_mm512_and_si512(b, upper)), sum);
#endif
}

/* ROWS rows of A times 16 columns of each of `halves` tiles of B, over `deep` tiles of k, of the last of which `pairs` are
   there, of each piece; rows of C are `apart`. */
ALWAYS void multiply_rows(const uint16_t *a, int64_t stride, int64_t step, const uint16_t *b0, const uint16_t *b1,
                          int64_t deep, int64_t pieces, int64_t halves, const int64_t *pairs, float *c0, float *c1,
                          int64_t apart, int added, struct soon *soon) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < deep; k++) {
        for (int64_t piece = 0; piece < pieces; piece++) {
            const uint16_t *left = a + k * step + piece * TILE;
            int64_t right = (k * pieces + piece) * TILE, count = k + 1 < deep ? SIDE : pairs[piece];
#pragma GCC unroll 2
            for (int64_t i = 0; i < count; i++) {
                __m512i one = _mm512_load_si512(b0 + right + i * DEEP), two = one;
                if (halves == 2)
                    two = _mm512_load_si512(b1 + right + i * DEEP);
#pragma GCC unroll 8
                for (int64_t r = 0; r < ROWS; r++) {
                    int32_t pair;
                    memcpy(&pair, left + r * stride + 2 * i, sizeof pair);
                    sums[r][0] = with_product(sums[r][0], _mm512_set1_epi32(pair), one, pieces);
                    if (halves == 2)
                        sums[r][1] = with_product(sums[r][1], _mm512_set1_epi32(pair), two, pieces);
                }
            }
        }
        if (soon)
            ask(soon);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; r++) {
        if (added) {
            sums[r][0] = _mm512_add_ps(sums[r][0], _mm512_loadu_ps(c0 + r * apart));
            sums[r][1] = _mm512_add_ps(sums[r][1], _mm512_loadu_ps(c1 + r * apart));
        }
        _mm512_storeu_ps(c0 + r * apart, sums[r][0]);
        _mm512_storeu_ps(c1 + r * apart, sums[r][1]);
    }
}

/* Tiles of k, for so many pieces, that are summed before they are added to the others: the tiles of A and B are then in
   the nearest cache for all rows, and short sums are more exact. */
#define AT_ONCE 8

ALWAYS void multiply(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                     int64_t halves, const struct extent *there, float *const c[4], int64_t apart, int added,
                     struct soon *soon) {
    const int64_t all[2] = {SIDE, SIDE}, most = AT_ONCE / pieces;
    for (int64_t k = 0; !k || k < deep; k += most) {
        int64_t right = k * pieces * TILE, last = deep - k <= most, count = last ? deep - k : most;
        for (int64_t row = 0; row < 2 * SIDE && row < there->rows; row += ROWS) {
            int64_t half = row / SIDE, within = row % SIDE;
            const uint16_t *left = (half ? a->bottom : a->top) + within * a->stride + k * a->step;
            float *c0 = c[2 * half] + within * apart, *c1 = c[2 * half + 1] + within * apart;
            multiply_rows(left, a->stride, a->step, b0 + right, b1 + right, count, pieces, halves,
                          last ? there->pairs : all, c0, c1, apart, added || k, row ? NULL : soon);
        }
    }
}

/* c = a times (b0, b1) over `deep` tiles of k: c[0] = top b0, c[1] = top b1, c[2] = bottom b0, c[3] = bottom b1;
   `added` to what is there. What is not `there` is not computed: rows stay as they are, columns are 0. */
static inline void product(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                    const struct extent *there, float c[4][SIDE * SIDE], int added, struct soon *soon) {
    float *const to[4] = {c[0], c[1], c[2], c[3]};
    if (pieces == 2 && there->columns > SIDE)
        multiply(a, b0, b1, deep, 2, 2, there, to, SIDE, added, soon);
    else if (pieces == 2)
        multiply(a, b0, b1, deep, 2, 1, there, to, SIDE, added, soon);
    else if (there->columns > SIDE)
        multiply(a, b0, b1, deep, 1, 2, there, to, SIDE, added, soon);
    else
        multiply(a, b0, b1, deep, 1, 1, there, to, SIDE, added, soon);
}

/* The same into rows of 32 numbers, `apart`, of which so many are there. */
ALWAYS void product_in_rows(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                            int64_t rows, float *to, int64_t apart) {
    const struct extent there = {rows, 2 * SIDE, {SIDE, SIDE}};
    float *const parts[4] = {to, to + SIDE, to + SIDE * apart, to + SIDE * apart + SIDE};
    multiply(a, b0, b1, deep, pieces, 2, &there, parts, apart, 0, NULL);
}

#endif
