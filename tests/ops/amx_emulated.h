/* Tiles of AMX in plain C, so that kernels that need them are tested where there are none: included before everything
   else, it takes the place of the compiler's intrinsics. Eight tiles, all whole; as the processor does, products take
   numbers without a leading bit for 0, and sums that would have none become 0. Whatever these kernels do not do ends the
   process. */

#ifndef MOESTRO_AMX_EMULATED_H
#define MOESTRO_AMX_EMULATED_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED_TILES 8

static __thread struct {
    int configured;
    uint8_t rows[EMULATED_TILES][16][64];
} emulated;

static inline void *emulated_tile(int number) {
    if (!emulated.configured || number < 0 || number >= EMULATED_TILES)
        abort();
    return emulated.rows[number];
}

static inline void emulated_loadconfig(const void *config) {
    const uint8_t *bytes = config; /* palette, start, 14 zeros, 16 widths of 2 bytes, 16 heights */
    if (bytes[0] != 1 || bytes[1] != 0)
        abort();
    for (int i = 0; i < EMULATED_TILES; i++)
        if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16)
            abort();
    memset(&emulated, 0, sizeof emulated);
    emulated.configured = 1;
}

static inline void emulated_release(void) { emulated.configured = 0; }

static inline void emulated_zero(int number) { memset(emulated_tile(number), 0, 16 * 64); }

static inline void emulated_loadd(int number, const void *from, int64_t stride) {
    uint8_t *tile = emulated_tile(number);
    for (int i = 0; i < 16; i++)
        memcpy(tile + i * 64, (const uint8_t *)from + i * stride, 64);
}

static inline void emulated_stored(int number, void *to, int64_t stride) {
    const uint8_t *tile = emulated_tile(number);
    for (int i = 0; i < 16; i++)
        memcpy((uint8_t *)to + i * stride, tile + i * 64, 64);
}

static inline float emulated_number(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x7f80 ? bits : bits & 0x8000) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Of every pair the sums of the first and of the second numbers by themselves, then both to the tile. */
static inline void emulated_dpbf16ps(int sums, int left, int right) {
    float(*c)[16] = emulated_tile(sums);
    const uint16_t(*a)[32] = emulated_tile(left), (*b)[32] = emulated_tile(right);
    float wide[16][2][16];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 32; n++)
            wide[k][n % 2][n / 2] = emulated_number(b[k][n]);
    for (int m = 0; m < 16; m++) {
        float both[2][16] = {{0}};
        for (int k = 0; k < 16; k++)
            for (int half = 0; half < 2; half++) {
                float x = emulated_number(a[m][2 * k + half]);
                for (int n = 0; n < 16; n++)
                    both[half][n] += x * wide[k][half][n];
            }
        for (int n = 0; n < 16; n++) {
            c[m][n] += both[0][n] + both[1][n];
            if (fabsf(c[m][n]) < 0x1p-126f)
                c[m][n] = copysignf(0, c[m][n]);
        }
    }
}

/* By other names, because some compilers have functions of these ones, and some have macros. */
#undef _tile_loadconfig
#define _tile_loadconfig emulated_loadconfig
#undef _tile_release
#define _tile_release emulated_release
#undef _tile_zero
#define _tile_zero emulated_zero
#undef _tile_loadd
#define _tile_loadd emulated_loadd
#undef _tile_stored
#define _tile_stored emulated_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated_dpbf16ps

#endif
