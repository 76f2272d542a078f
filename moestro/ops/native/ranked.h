/* The k greatest of a row of scores, in order.

   Scores become int32 that compare as the scores do, NaN above all. Together with its place, lower is better, each is
   one int64 without equals: so the order of equal scores is defined (reference.py), and counting how many are greater
   gives each its place in the result. Only what a threshold leaves comes that far. */

#ifndef MOESTRO_RANKED_H
#define MOESTRO_RANKED_H

#include <stdlib.h>

#include "vector.h"

#define LANES (WIDTH / 2)
#define FEW 256 /* that are counted instead of sorted */
#define UP(value, multiple) (((value) + (multiple) - 1) / (multiple) * (multiple))

typedef int64_t lvec __attribute__((vector_size(WIDTH * 4)));

static inline ivec sortable(vec score) {
    score += (vec){0}; /* -0 and 0 are equal scores */
    ivec bits;
    memcpy(&bits, &score, sizeof bits);
    ivec key = bits ^ (bits >> 31 & INT32_MAX);
    ivec nan = score != score;
    return (key & ~nan) | (nan & INT32_MAX);
}

static inline int32_t sortable_one(float score) {
    score += 0.0f;
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}

static inline int64_t placed(int32_t key, int64_t place) {
    return (int64_t)((uint64_t)(uint32_t)key << 32 | (uint32_t)~(uint32_t)place);
}

static inline int64_t place_of(int64_t item) { return (uint32_t)~(uint32_t)item; }

static inline float score_of(int64_t item) {
    int32_t key = (int32_t)(item >> 32), bits = key ^ (key >> 31 & INT32_MAX);
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

/* The greater; `other` where `score` is not a number. */
static inline vec greater(vec score, vec other) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)score, (__m512)other);
#else
    return choose(score > other, score, other);
#endif
}

/* The k-th greatest of values[0..count), or less; none is NaN, and count is a multiple of WIDTH. */
static inline float kth_greatest(const float *values, int64_t count, int64_t k) {
    const vec most = (vec){0} + __builtin_inff();
    vec least = most;
    for (int64_t i = 0; i < count; i += WIDTH) {
        vec mine = load(values + i);
        ivec above = {0};
        for (int64_t j = 0; j < count; j++)
            above -= values[j] > mine;
        vec value = choose(above < (int32_t)k, mine, most);
        least = choose(value < least, value, least);
    }
    float result = least[0];
    for (int i = 1; i < WIDTH; i++)
        result = least[i] < result ? least[i] : result;
    return result;
}

/* The greatest of each of `groups` groups of scores[0..count): i is in group i % groups. Both are multiples of WIDTH.
   Scores that are not numbers do not count. */
static inline void maxima_of(const float *scores, int64_t count, int64_t groups, float *maxima) {
    for (int64_t group = 0; group < groups; group += WIDTH) {
        vec most = (vec){0} - __builtin_inff();
        for (int64_t i = group; i < count; i += groups)
            most = greater(load(scores + i), most);
        store(maxima + group, most);
    }
}

/* Those of scores[0..count) that are not less than `least`, with their places, in `out`; returns how many. Without a
   branch on what is found: it cannot be foreseen. `places` has room for `count` and WIDTH more, `out` likewise. */
static inline int64_t survivors(const float *scores, int64_t count, float least, int32_t *places, int64_t *out) {
    int64_t found = 0;
#if defined(__AVX512F__)
    const __m512i step = _mm512_set1_epi32(16);
    const __m512 bound = _mm512_set1_ps(least);
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 in = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), bound, _CMP_NLT_UQ);
        _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(in, here));
        found += __builtin_popcount(in);
        here = _mm512_add_epi32(here, step);
    }
    for (int64_t i = 0; i < found; i += 16) {
        __mmask16 in = found - i >= 16 ? 0xffff : (__mmask16)((1u << (found - i)) - 1);
        __m512i place = _mm512_loadu_si512(places + i);
        __m512i key = (__m512i)sortable((vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), in, place, scores, 4));
        place = _mm512_xor_si512(place, _mm512_set1_epi32(-1));
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi32(place, low, key));
        _mm512_storeu_si512(out + i + 8, _mm512_permutex2var_epi32(place, high, key));
    }
#else
    for (int64_t i = 0; i < count; i++) {
        places[found] = (int32_t)i;
        found += !(scores[i] < least);
    }
    for (int64_t i = 0; i < found; i++)
        out[i] = placed(sortable_one(scores[places[i]]), places[i]);
#endif
    return found;
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The k greatest of all[0..count), in order, into best[0..k); no two are equal. `all` has room for LANES more. */
static inline void in_order(int64_t *all, int64_t count, int64_t k, int64_t *best) {
    int64_t ranked[FEW + 1]; /* what fills the last vector comes behind all others */
    if (count > FEW) {
        qsort(all, count, sizeof *all, descending);
        memcpy(best, all, k * sizeof *best);
        return;
    }
    for (int64_t i = count; i < UP(count, LANES); i++)
        all[i] = INT64_MIN;
    for (int64_t i = 0; i < count; i += LANES) {
        lvec mine, rank = {0};
        memcpy(&mine, all + i, sizeof mine);
        for (int64_t j = 0; j < count; j++)
            rank -= all[j] > mine;
        for (int l = 0; l < LANES; l++)
            ranked[rank[l]] = mine[l];
    }
    memcpy(best, ranked, k * sizeof *best);
}

#endif
