/* Products of tiles on tiles of AMX. `registers.h` has the same names for processors without them. */

#ifndef MOESTRO_AMX_H
#define MOESTRO_AMX_H

struct tile_config {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Eight tiles, all whole. A constant, because compilers think that only its first bytes are read. */
static inline void use_tiles(void) {
    static const struct tile_config config = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    _tile_loadconfig(&config);
}

ALWAYS void load_left(const struct left *a, int64_t k, int64_t piece) {
    _tile_loadd(4, a->top + k * a->step + piece * TILE, a->stride * 2);
    _tile_loadd(5, a->bottom + k * a->step + piece * TILE, a->stride * 2);
}

ALWAYS void load_right(const uint16_t *b0, const uint16_t *b1, int64_t k, int64_t pieces, int64_t piece) {
    _tile_loadd(6, b0 + (k * pieces + piece) * TILE, 64);
    _tile_loadd(7, b1 + (k * pieces + piece) * TILE, 64);
}

ALWAYS void multiply_tiles(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* A tile of k, the smallest products first, each tile loaded as seldom as four registers allow. */
ALWAYS void multiply_pieces(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t k, int64_t pieces) {
    load_left(a, k, 0);
    load_right(b0, b1, k, pieces, pieces - 1);
    multiply_tiles();
    if (pieces == 3) {
        load_right(b0, b1, k, pieces, 1);
        multiply_tiles();
        load_left(a, k, 1);
        multiply_tiles();
        load_right(b0, b1, k, pieces, 0);
        multiply_tiles();
    }
    if (pieces > 1) {
        load_left(a, k, pieces - 1);
        if (pieces == 2)
            load_right(b0, b1, k, pieces, 0);
        multiply_tiles();
        load_left(a, k, 0);
        multiply_tiles();
    }
}

ALWAYS void multiply_along(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                           struct soon *soon) {
    for (int64_t k = 0; k < deep; k++) {
        multiply_pieces(a, b0, b1, k, pieces);
        if (soon)
            ask(soon);
    }
}

static inline void release_tiles(void) { _tile_release(); }

ALWAYS void no_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* c = a times (b0, b1) over `deep` tiles of k: c[0] = top b0, c[1] = top b1, c[2] = bottom b0, c[3] = bottom b1;
   `added` to what is there. All of it, whatever is `there`. */
static inline void product(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                           const struct extent *there, float c[4][SIDE * SIDE], int added, struct soon *soon) {
    (void)there;
    if (added) {
        _tile_loadd(0, c[0], 64);
        _tile_loadd(1, c[1], 64);
        _tile_loadd(2, c[2], 64);
        _tile_loadd(3, c[3], 64);
    } else
        no_sums();
    if (pieces == 3)
        multiply_along(a, b0, b1, deep, 3, soon);
    else if (pieces == 2)
        multiply_along(a, b0, b1, deep, 2, soon);
    else
        multiply_along(a, b0, b1, deep, 1, soon);
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
}

/* The same into rows of 32 numbers, `apart`: all of them, however many are there. */
ALWAYS void product_in_rows(const struct left *a, const uint16_t *b0, const uint16_t *b1, int64_t deep, int64_t pieces,
                            int64_t rows, float *to, int64_t apart) {
    (void)rows;
    no_sums();
    multiply_along(a, b0, b1, deep, pieces, NULL);
    _tile_stored(0, to, apart * 4);
    _tile_stored(1, to + SIDE, apart * 4);
    _tile_stored(2, to + SIDE * apart, apart * 4);
    _tile_stored(3, to + SIDE * apart + SIDE, apart * 4);
}

#endif
