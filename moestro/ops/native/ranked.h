/* The k greatest of a row of scores, in order.

   Only what a threshold leaves has to be sorted. Its scores become int32 that compare as they do, NaN above all; counting
   how many come before each gives its place in the result, unless there are so many that sorting is faster. Of equal
   scores the one with the lower place comes first (reference.py), so that the order is defined. */

#ifndef MOESTRO_RANKED_H
#define MOESTRO_RANKED_H

#include <stdlib.h>

#include "vector.h"
#if defined(__AVX512F__)
#include "pieces.h"
#endif

#define FEW 256    /* that are counted instead of sorted */
#define HALVINGS 24 /* at most: equals, and numbers far above the others, cannot be told apart so */
#define UP(value, multiple) (((value) + (multiple) - 1) / (multiple) * (multiple))

static inline ivec sortable(vec score) {
    score += (vec){0}; /* -0 and 0 are equal scores */
    ivec bits;
    memcpy(&bits, &score, sizeof bits);
    ivec key = bits ^ (bits >> 31 & INT32_MAX);
    ivec nan = score != score;
    return (key & ~nan) | (nan & INT32_MAX);
}

static inline void sortable_keys(const float *scores, int64_t count, int32_t *keys) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        ivec key = sortable(load(scores + i));
        memcpy(keys + i, &key, sizeof key);
    }
}

static inline int32_t sortable_one(float score) {
    score += 0.0f;
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}

/* count, and one more where a is less than b. */
static inline ivec add_where_less(ivec count, ivec a, int32_t b) {
#if defined(__AVX512F__)
    __mmask16 less = _mm512_cmplt_epi32_mask((__m512i)a, _mm512_set1_epi32(b));
    return (ivec)_mm512_mask_add_epi32((__m512i)count, less, (__m512i)count, _mm512_set1_epi32(1));
#else
    return count - (a < b);
#endif
}

/* above[i] = how many of keys[0..count) are greater than keys[i]; both have room for two vectors more. */
static inline void count_greater(const int32_t *keys, int64_t count, int32_t *above) {
    for (int64_t i = 0; i < count; i += 2 * WIDTH) {
        ivec low, high, under_low = {0}, under_high = {0};
        memcpy(&low, keys + i, sizeof low), memcpy(&high, keys + i + WIDTH, sizeof high);
        for (int64_t j = 0; j < count; j++)
            under_low = add_where_less(under_low, low, keys[j]), under_high = add_where_less(under_high, high, keys[j]);
        memcpy(above + i, &under_low, sizeof low), memcpy(above + i + WIDTH, &under_high, sizeof high);
    }
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

static inline int32_t greatest_count(ivec counts) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)counts);
#else
    int32_t most = counts[0];
    for (int i = 1; i < WIDTH; i++)
        most = counts[i] > most ? counts[i] : most;
    return most;
#endif
}

/* In each lane the k-th greatest of values[0..count), or less, by halving what lies between the least and the greatest
   until few others are left above; none is NaN. */
static inline vec kth_greatest(const vec *values, int64_t count, int64_t k) {
    vec least = values[0], most = least;
    for (int64_t i = 1; i < count; i++)
        least = -greater(-values[i], -least), most = greater(values[i], most);
    ivec left = (ivec){0} + (int32_t)count;
    for (int step = 0; step < HALVINGS && greatest_count(left) > k + k / 8 + 1; step++) {
        vec middle = least * 0.5f + most * 0.5f; /* NaN between infinities: none is enough, and it ends there */
        ivec found = {0};
        for (int64_t i = 0; i < count; i++)
            found -= values[i] >= middle;
        ivec enough = found >= (int32_t)k;
        least = choose(enough, middle, least), most = choose(enough, most, middle);
        left = (found & enough) | (left & ~enough);
    }
    return least;
}

/* WIDTH rows of as many numbers, `row` apart, as columns. */
static inline void to_columns(const float *from, int64_t row, vec *to) {
#if defined(__AVX512F__)
    __m512i v[SIDE];
    for (int i = 0; i < SIDE; i++)
        v[i] = _mm512_loadu_si512(from + i * row);
    exchange(v);
    memcpy(to, v, sizeof v);
#else
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++)
            to[j][i] = from[i * row + j];
#endif
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

/* Places of those of scores[0..count) that are not less than `least`, and their scores if `values` is not NULL; returns
   how many. Without a branch on what is found: it cannot be foreseen. Both have room for WIDTH more. */
static inline int64_t survivors(const float *scores, int64_t count, float least, int32_t *places, float *values) {
    int64_t found = 0;
#if defined(__AVX512F__)
    const __m512i step = _mm512_set1_epi32(16);
    const __m512 bound = _mm512_set1_ps(least);
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < count; i += 16) {
        __m512 some = _mm512_loadu_ps(scores + i);
        __mmask16 in = _mm512_cmp_ps_mask(some, bound, _CMP_NLT_UQ);
        _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(in, here));
        if (values)
            _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(in, some));
        found += __builtin_popcount(in);
        here = _mm512_add_epi32(here, step);
    }
#else
    for (int64_t i = 0; i < count; i++) {
        places[found] = (int32_t)i;
        if (values)
            values[found] = scores[i];
        found += !(scores[i] < least);
    }
#endif
    return found;
}

/* The sum of numbers[0..count); count is a multiple of WIDTH. */
static inline int64_t total_of(const int32_t *numbers, int64_t count) {
    ivec total = {0};
    for (int64_t i = 0; i < count; i += WIDTH) {
        ivec some;
        memcpy(&some, numbers + i, sizeof some);
        total += some;
    }
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)total);
#else
    int64_t all = 0;
    for (int i = 0; i < WIDTH; i++)
        all += total[i];
    return all;
#endif
}

/* before[i], how many are greater, is also how many come before: of equal keys the first comes first. */
static inline void count_equal(const int32_t *keys, int64_t count, int32_t *before) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < i; j++)
            before[i] += keys[j] == keys[i];
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* items[0..count): sortable scores, each with where it stands, as one number, without equals, the first first. */
static inline void sorted(const float *scores, int64_t count, int64_t *items) {
    for (int64_t i = 0; i < count; i++)
        items[i] = (int64_t)((uint64_t)(uint32_t)sortable_one(scores[i]) << 32 | (uint32_t)~(uint32_t)i);
    qsort(items, count, sizeof *items, descending);
}

static inline uint32_t stands_at(int64_t item) { return ~(uint32_t)item; }

/* The k first of scores[0..count), count >= k, which have ascending places, in order, with their places, and -infinity
   behind them. There is room for one more there, for WIDTH more scores and places, and for `count` items. */
static inline void in_order(const float *scores, const int32_t *places, int64_t count, int64_t k, int64_t *items,
                            float *first, int32_t *where) {
    int32_t keys[FEW + 2 * WIDTH], before[FEW + 2 * WIDTH];
    if (count > FEW) {
        sorted(scores, count, items);
        for (int64_t j = 0; j < k; j++)
            first[j] = scores[stands_at(items[j])], where[j] = places[stands_at(items[j])];
    } else {
        /* what follows the scores comes after all of them: loops whose ends can be foreseen */
        int64_t whole = UP(count, WIDTH), some = UP(count, WIDTH / 2);
        sortable_keys(scores, whole, keys);
        for (int64_t i = 0; i < WIDTH; i++)
            keys[count + i] = INT32_MIN;
        count_greater(keys, some, before);
        if (total_of(before, whole) < count * (count - 1) / 2 + (whole - count) * count)
            count_equal(keys, count, before);
        for (int64_t i = 0; i < some; i++) {
            int64_t at = before[i] < k ? before[i] : k;
            first[at] = scores[i], where[at] = places[i];
        }
    }
    first[k] = -__builtin_inff();
}

#endif
