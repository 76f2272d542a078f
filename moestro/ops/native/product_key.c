/* The k best of n * n product keys: products with the keys of each side, block by block in cache, and the k best of
   them by a threshold; then the k best sums. The [t, h, 2, n] scores are never written.

   Scores become int32 that compare as the scores do, NaN above all. Together with its place, lower is better, each is
   one int64 without equals: so the order of equal scores is defined (reference.py), and counting how many are greater
   gives each its place in the result. */

#include <stdlib.h>

#include "vector.h"

#if defined(__AVX512F__)
#define VECS 4
#else
#define VECS 2
#endif
#define BLOCK 64 /* keys packed together */
#define TILE (VECS * WIDTH)
#define QUERIES 6 /* with TILE keys they fill the registers */
#define TOKENS 48 /* at a time, a multiple of QUERIES */
#define LANES (WIDTH / 2)
#define LEAST INT32_MIN
#define FEW 256 /* that are counted instead of sorted */

typedef int64_t lvec __attribute__((vector_size(WIDTH * 4)));

static int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct packing {
    const float *keys; /* [2, g, n, half] */
    float *packed;     /* [2 * g * blocks, half, BLOCK], zeros past n */
    int64_t n, half;
};

/* Item: one block of one side of one group. */
KERNEL(pack_keys)(const void *fields, int64_t begin, int64_t end) {
    const struct packing *f = fields;
    int64_t blocks = rounded_up(f->n, BLOCK) / BLOCK;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % blocks * BLOCK;
        int64_t count = f->n - first < BLOCK ? f->n - first : BLOCK;
        const float *keys = f->keys + (item / blocks * f->n + first) * f->half;
        float *packed = f->packed + item * f->half * BLOCK;
        for (int64_t c = 0; c < f->half; c++) {
            for (int64_t i = 0; i < count; i++)
                packed[c * BLOCK + i] = keys[i * f->half + c];
            for (int64_t i = count; i < BLOCK; i++)
                packed[c * BLOCK + i] = 0;
        }
    }
}

static inline ivec sortable(vec score) {
    score += (vec){0}; /* -0 and 0 are equal scores */
    ivec bits;
    memcpy(&bits, &score, sizeof bits);
    ivec key = bits ^ (bits >> 31 & INT32_MAX);
    ivec nan = score != score;
    return (key & ~nan) | (nan & INT32_MAX);
}

static inline float score_of(int32_t key) {
    int32_t bits = key ^ (key >> 31 & INT32_MAX);
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

static inline int32_t sortable_one(float score) {
    score += 0.0f;
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}

/* Products of QUERIES queries with TILE packed keys: every sum runs over c in order, whatever the blocks. */
static inline void tile(const float *const *query, const float *packed, int64_t half, int32_t *out, int64_t stride) {
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
        for (int v = 0; v < VECS; v++) {
            ivec key = sortable(sums[q][v]);
            memcpy(out + q * stride + v * WIDTH, &key, sizeof key);
        }
}

/* The k-th greatest of values[0..count), or less; count is a multiple of WIDTH. */
static int32_t kth_greatest(const int32_t *values, int64_t count, int64_t k) {
    ivec least = (ivec){0} + INT32_MAX;
    for (int64_t i = 0; i < count; i += WIDTH) {
        ivec mine, greater = {0};
        memcpy(&mine, values + i, sizeof mine);
        for (int64_t j = 0; j < count; j++)
            greater -= values[j] > mine;
        ivec in = greater < (int32_t)k;
        ivec value = (mine & in) | (~in & INT32_MAX);
        ivec less = value < least;
        least = (value & less) | (least & ~less);
    }
    int32_t result = INT32_MAX;
    for (int i = 0; i < WIDTH; i++)
        result = least[i] < result ? least[i] : result;
    return result;
}

static inline int64_t placed(int32_t key, int64_t place) {
    return (int64_t)((uint64_t)(uint32_t)key << 32 | (uint32_t)~(uint32_t)place);
}

/* Those of keys[0..count) that are at least `least`, with their places; returns how many. Without a branch on what is
   found: it cannot be foreseen. `spare` has room for 2 * count and 2 * WIDTH more. */
static int64_t survivors(const int32_t *keys, int64_t count, int32_t least, int32_t *spare, int64_t *out) {
    int64_t found = 0;
#if defined(__AVX512F__)
    int32_t *place = spare + count + WIDTH;
    const __m512i step = _mm512_set1_epi32(-16), bound = _mm512_set1_epi32(least);
    /* ~place for places 0, 1, ... */
    __m512i here = _mm512_setr_epi32(-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16);
    for (int64_t i = 0; i < count; i += 16) {
        __m512i key = _mm512_loadu_si512(keys + i);
        __mmask16 in = _mm512_cmpge_epi32_mask(key, bound);
        _mm512_storeu_si512(spare + found, _mm512_maskz_compress_epi32(in, key));
        _mm512_storeu_si512(place + found, _mm512_maskz_compress_epi32(in, here));
        found += __builtin_popcount(in);
        here = _mm512_add_epi32(here, step);
    }
    for (int64_t i = 0; i < found; i++)
        out[i] = (int64_t)((uint64_t)(uint32_t)spare[i] << 32 | (uint32_t)place[i]);
#else
    (void)spare;
    for (int64_t i = 0; i < count; i++) {
        out[found] = placed(keys[i], i);
        found += keys[i] >= least;
    }
#endif
    return found;
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The k greatest of all[0..count), in order, into best[0..k); no two are equal. `all` has room for LANES more. */
static void in_order(int64_t *all, int64_t count, int64_t k, int64_t *best) {
    int64_t ranked[FEW + 1]; /* what fills the last vector comes behind all others */
    if (count > FEW) {
        qsort(all, count, sizeof *all, descending);
        memcpy(best, all, k * sizeof *best);
        return;
    }
    for (int64_t i = count; i < rounded_up(count, LANES); i++)
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

/* What one thread needs. */
struct room {
    int32_t *keys;   /* [TOKENS, padded n] */
    int64_t *best;   /* [2, TOKENS, k], and LANES more */
    int32_t *maxima; /* [groups], a multiple of WIDTH */
    int32_t *spare;  /* as `survivors` wants it */
    int64_t *some;   /* [padded n, or padded candidates], and LANES more */
    int32_t *p, *r;  /* [padded candidates] the pairs that can be among the k best sums */
    int32_t *reach;  /* [k] the least r such that k pairs or more are as good as (p, r) */
    int32_t *sums;   /* [padded candidates] */
    float *sides;    /* [2, k] */
    int64_t n_pairs, padded, groups;
};

/* The k greatest of keys[0..count) with their places, in order. The k-th greatest of the maxima of at least k groups
   is at most the k-th greatest of all. `count` is a multiple of BLOCK, of which no more than the last BLOCK - 1 are
   LEAST. */
static void best_of(const int32_t *keys, int64_t count, int64_t k, const struct room *room, int64_t *best) {
    const int64_t groups = room->groups;
    int32_t *maxima = room->maxima;
    for (int64_t group = 0; group < groups; group += WIDTH) {
        ivec most = (ivec){0} + LEAST;
        for (int64_t i = group; i < count; i += groups) {
            ivec key;
            memcpy(&key, keys + i, sizeof key);
            ivec greater = key > most;
            most = (key & greater) | (most & ~greater);
        }
        memcpy(maxima + group, &most, sizeof most);
    }
    int64_t found = survivors(keys, count, kth_greatest(maxima, groups, k), room->spare, room->some);
    in_order(room->some, found, k, best);
}

struct search {
    const float *query;  /* [t, h, 2, half] */
    const float *packed; /* as pack_keys left it */
    float *scores;       /* [t, h, k] */
    int64_t *ids;        /* [t, h, k] */
    int64_t t, h, g, n, half, k;
};

/* Their number; the pairs and their reach where there is room for them. */
static int64_t staircase(int64_t k, struct room *room) {
    int64_t count = 0;
    for (int64_t p = 0; p < k; p++) {
        for (int64_t r = 0; (p + 1) * (r + 1) <= k; r++, count++)
            if (room)
                room->p[count] = (int32_t)p, room->r[count] = (int32_t)r;
        if (room)
            room->reach[p] = (int32_t)((k + p) / (p + 1) - 1);
    }
    return count;
}

static void search_side(const struct search *f, struct room *room, int64_t head, int64_t first, int64_t count,
                        int side) {
    int64_t blocks = room->padded / BLOCK, row = f->h * 2 * f->half;
    const float *query = f->query + first * row + (head * 2 + side) * f->half;
    const float *packed = f->packed + (side * f->g + (f->g == 1 ? 0 : head)) * blocks * f->half * BLOCK;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t t = 0; t < count; t += QUERIES) {
            const float *queries[QUERIES];
            for (int q = 0; q < QUERIES; q++) /* past the end: the last once more, and nobody reads the result */
                queries[q] = query + (t + q < count ? t + q : count - 1) * row;
            for (int64_t at = 0; at < BLOCK; at += TILE)
                tile(queries, packed + block * f->half * BLOCK + at, f->half,
                     room->keys + t * room->padded + block * BLOCK + at, room->padded);
        }
    for (int64_t t = 0; t < count; t++) {
        int32_t *keys = room->keys + t * room->padded;
        for (int64_t i = f->n; i < room->padded; i++)
            keys[i] = LEAST;
        best_of(keys, room->padded, f->k, room, room->best + (side * TOKENS + t) * f->k);
    }
}

static inline int64_t place_of(int64_t item) { return (uint32_t)~(uint32_t)item; }

static inline int32_t key_of(int64_t item) { return (int32_t)(item >> 32); }

/* At most the k-th best sum: at least k pairs are as good as (p, reach of p), for every p. */
static int32_t least_sum(const struct room *room, const float *a, const float *b, int64_t k) {
    int32_t least = LEAST;
    for (int64_t p = 0; p < k; p++) {
        float sum = a[p] + b[room->reach[p]];
        int32_t key = sortable_one(sum);
        if (sum == sum && key > least) /* infinities of both signs: pairs before it may be worse */
            least = key;
    }
    return least;
}

static void best_sums(const struct search *f, struct room *room, const int64_t *left, const int64_t *right,
                      float *scores, int64_t *ids) {
    float *a = room->sides, *b = a + f->k;
    int64_t padded = rounded_up(room->n_pairs, WIDTH);
    for (int64_t j = 0; j < f->k; j++)
        a[j] = score_of(key_of(left[j])), b[j] = score_of(key_of(right[j]));
    for (int64_t c = 0; c < padded; c += WIDTH) {
        vec sum;
        for (int i = 0; i < WIDTH; i++)
            sum[i] = a[room->p[c + i]] + b[room->r[c + i]];
        ivec key = sortable(sum);
        memcpy(room->sums + c, &key, sizeof key);
    }
    for (int64_t c = room->n_pairs; c < padded; c++)
        room->sums[c] = LEAST;
    int64_t *best = room->best + 2 * TOKENS * f->k;
    int64_t found = survivors(room->sums, padded, least_sum(room, a, b, f->k), room->spare, room->some);
    in_order(room->some, found, f->k, best);
    for (int64_t j = 0; j < f->k; j++) {
        int64_t pair = place_of(best[j]);
        scores[j] = score_of(key_of(best[j]));
        ids[j] = place_of(left[room->p[pair]]) * f->n + place_of(right[room->r[pair]]);
    }
}

/* Item: TOKENS tokens of one head. */
KERNEL(product_key_topk)(const void *fields, int64_t begin, int64_t end) {
    const struct search *f = fields;
    int64_t candidates = staircase(f->k, NULL), parts = rounded_up(f->t, TOKENS) / TOKENS;
    struct room room = {
        .padded = rounded_up(f->n, BLOCK), .groups = rounded_up(2 * f->k, WIDTH), .n_pairs = candidates};
    int64_t padded = rounded_up(candidates, WIDTH);
    int64_t most = (room.padded > padded ? room.padded : padded) + LANES;
    room.keys = malloc(TOKENS * room.padded * sizeof *room.keys);
    room.best = malloc((2 * TOKENS + 1) * f->k * sizeof *room.best);
    room.maxima = malloc(room.groups * sizeof *room.maxima);
    room.some = malloc(most * sizeof *room.some);
    room.spare = malloc(2 * (most + WIDTH) * sizeof *room.spare);
    room.p = calloc(3 * padded + f->k, sizeof *room.p);
    room.sides = malloc(2 * f->k * sizeof *room.sides);
    if (!room.keys || !room.best || !room.maxima || !room.some || !room.spare || !room.p || !room.sides)
        abort();
    room.r = room.p + padded, room.sums = room.r + padded, room.reach = room.sums + padded;
    staircase(f->k, &room);
    for (int64_t item = begin; item < end; item++) {
        int64_t head = item / parts, first = item % parts * TOKENS;
        int64_t count = f->t - first < TOKENS ? f->t - first : TOKENS;
        for (int side = 0; side < 2; side++)
            search_side(f, &room, head, first, count, side);
        for (int64_t t = 0; t < count; t++) {
            int64_t at = ((first + t) * f->h + head) * f->k;
            best_sums(f, &room, room.best + t * f->k, room.best + (TOKENS + t) * f->k, f->scores + at, f->ids + at);
        }
    }
    free(room.keys), free(room.best), free(room.maxima), free(room.some), free(room.spare);
    free(room.p), free(room.sides);
}

struct gradient {
    const float *factor; /* keys [2, g, n, half] for the queries' gradient, queries [t, h, 2, half] for the keys' */
    const int64_t *ids;  /* [t, h, k] */
    const float *grad;   /* [t, h, k] of the scores */
    float *out;          /* the other one's shape */
    int64_t t, h, g, n, half, k;
};

static inline int64_t key_on(const struct gradient *f, int side, int64_t id) { return side ? id % f->n : id / f->n; }

/* Item: a token. */
KERNEL(product_key_query_gradient)(const void *fields, int64_t begin, int64_t end) {
    const struct gradient *f = fields;
    for (int64_t row = begin * f->h * 2; row < end * f->h * 2; row++) {
        int64_t side = row % 2, th = row / 2, group = f->g == 1 ? 0 : th % f->h;
        const float *keys = f->factor + (side * f->g + group) * f->n * f->half;
        float *out = f->out + row * f->half;
        memset(out, 0, f->half * sizeof *out);
        for (int64_t j = th * f->k; j < (th + 1) * f->k; j++)
            add_float32(out, keys + key_on(f, side, f->ids[j]) * f->half, f->grad[j], f->half);
    }
}

#define COLUMNS 64

/* Item: COLUMNS columns of the keys of one side and group; tokens are added in order. */
KERNEL(product_key_key_gradient)(const void *fields, int64_t begin, int64_t end) {
    const struct gradient *f = fields;
    int64_t parts = rounded_up(f->half, COLUMNS) / COLUMNS;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % parts * COLUMNS, side = item / parts / f->g, group = item / parts % f->g;
        int64_t width = f->half - first < COLUMNS ? f->half - first : COLUMNS;
        float *out = f->out + item / parts * f->n * f->half + first;
        for (int64_t i = 0; i < f->n; i++)
            memset(out + i * f->half, 0, width * sizeof *out);
        for (int64_t th = f->g == 1 ? 0 : group; th < f->t * f->h; th += f->g == 1 ? 1 : f->h) {
            const float *query = f->factor + (th * 2 + side) * f->half + first;
            for (int64_t j = th * f->k; j < (th + 1) * f->k; j++)
                add_float32(out + key_on(f, side, f->ids[j]) * f->half, query, f->grad[j], width);
        }
    }
}
