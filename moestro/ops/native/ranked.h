/* The k greatest of a row of scores, in order.

   Only what a threshold leaves has to be sorted. Its scores become int32 that compare as they do, NaN above all; counting
   how many come before each gives its place in the result. Of equal scores the one with the lower place comes first
   (reference.py), so that the order is defined: a score and its place are one int64 without equals. */

#ifndef MOESTRO_RANKED_H
#define MOESTRO_RANKED_H

#include <stdlib.h>

#include "vector.h"

#define FEW 256 /* that are counted instead of sorted */
#define UP(value, multiple) (((value) + (multiple) - 1) / (multiple) * (multiple))

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

/* Of numbers. */
static inline float greatest_of(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < WIDTH; i++)
        most = v[i] > most ? v[i] : most;
    return most;
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
    return -greatest_of(-least);
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

/* Places of those of scores[0..count) that are not less than `least`; returns how many. Without a branch on what is
   found: it cannot be foreseen. `places` has room for WIDTH more. */
static inline int64_t survivors(const float *scores, int64_t count, float least, int32_t *places) {
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
#else
    for (int64_t i = 0; i < count; i++) {
        places[found] = (int32_t)i;
        found += !(scores[i] < least);
    }
#endif
    return found;
}

static inline void at_places(const float *scores, const int32_t *places, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++)
        to[i] = scores[places[i]];
}

/* How many of keys[0..count) come before each of the WIDTH from `first` on: greater ones, and equal ones before it. */
static inline ivec ranks(const int32_t *keys, int64_t count, int64_t first) {
    ivec mine, rank = {0}, lane;
    memcpy(&mine, keys + first, sizeof mine);
    for (int i = 0; i < WIDTH; i++)
        lane[i] = i;
    int64_t j = 0;
    for (; j < first; j++)
        rank -= keys[j] >= mine;
    for (; j < first + WIDTH && j < count; j++)
        rank -= (keys[j] > mine) | ((keys[j] == mine) & (lane > (int32_t)(j - first)));
    for (; j < count; j++)
        rank -= keys[j] > mine;
    return rank;
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* All of scores[0..count), which have ascending places, in order with them. There is room for WIDTH more scores. */
static inline void in_order(const float *scores, const int32_t *places, int64_t count, int64_t *items) {
    int32_t keys[FEW], rank[FEW];
    if (count > FEW) {
        for (int64_t i = 0; i < count; i++)
            items[i] = placed(sortable_one(scores[i]), places[i]);
        qsort(items, count, sizeof *items, descending);
        return;
    }
    for (int64_t i = 0; i < count; i += WIDTH) {
        ivec key = sortable(load(scores + i));
        memcpy(keys + i, &key, sizeof key);
    }
    for (int64_t i = 0; i < count; i += WIDTH) {
        ivec before = ranks(keys, count, i);
        memcpy(rank + i, &before, sizeof before);
    }
    for (int64_t i = 0; i < count; i++)
        items[rank[i]] = placed(keys[i], places[i]);
}

#endif
