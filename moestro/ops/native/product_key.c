/* The k best of n * n product keys: products with the keys of each side, a block of queries at a time, whose scores
   stay in the cache, and the k best of them by a threshold; then the k best sums. The [t, h, 2, n] scores are never
   written. */

#if defined(__AVX512BF16__)
#include "key_tiles.h"
#else
#include "key_products.h"
#endif

struct search {
    const float *query; /* [t, h, 2, half] */
    const float *keys;  /* [2, h, n, half] */
    float *scores;      /* [t, h, k] */
    int64_t *ids;       /* [t, h, k] */
    int64_t t, h, n, half, k;
    int64_t part; /* tokens of one item */
};

/* What one thread needs. */
struct room {
    struct packed packed;
    float *scores;   /* [TOKENS, stride] */
    int64_t *best;   /* [2, part, k] */
    float *maxima;   /* [groups], a multiple of WIDTH */
    int32_t *places; /* as `survivors` wants it */
    float *values;   /* likewise */
    int64_t *some;   /* likewise */
    int32_t *p, *r;  /* [padded pairs] the pairs that can be among the k best sums */
    int32_t *reach;  /* [padded k] the least r such that k pairs or more are as good as (p, r) */
    float *sums;     /* [padded pairs] */
    float *sides;    /* [2, padded k] */
    int64_t n_pairs, stride, groups;
};

/* The pairs (p, r) with (p + 1)(r + 1) <= k, and their reach where there is room for them; their number. */
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

static struct room room_for(const struct search *f) {
    int64_t pairs = staircase(f->k, NULL), padded = UP(pairs, WIDTH), k = UP(f->k, WIDTH);
    int64_t most = (whole_blocks(f->n) > padded ? whole_blocks(f->n) : padded) + WIDTH;
    struct room room = {
        .packed = room_for_keys(f->n, f->half), .groups = UP(2 * f->k, WIDTH), .n_pairs = pairs,
        .stride = whole_blocks(f->n) + WIDTH /* rows a page apart would push each other out of the cache */};
    room.scores = malloc(TOKENS * room.stride * sizeof *room.scores);
    room.best = malloc(2 * f->part * f->k * sizeof *room.best);
    room.maxima = malloc(room.groups * sizeof *room.maxima);
    room.places = malloc(most * sizeof *room.places);
    room.values = malloc(most * sizeof *room.values);
    room.some = malloc(most * sizeof *room.some);
    room.p = calloc(2 * padded + k, sizeof *room.p);
    room.sums = malloc((padded + 2 * k) * sizeof *room.sums);
    require_memory(room.packed.keys && room.scores && room.best && room.maxima && room.places && room.values &&
                   room.some && room.p && room.sums);
    room.r = room.p + padded, room.reach = room.r + padded, room.sides = room.sums + padded;
    memset(room.sides, 0, 2 * k * sizeof *room.sides);
    staircase(f->k, &room);
    return room;
}

static void free_room(struct room *room) {
    free_keys(&room->packed), free(room->scores), free(room->best), free(room->maxima), free(room->places);
    free(room->values), free(room->some), free(room->p), free(room->sums);
}

/* Where scores that are not the true ones left many: those that the true ones leave, and how many. */
static int64_t still_there(const struct room *room, int64_t found, int64_t k) {
    float *values = room->values;
    int64_t count = UP(found, WIDTH), kept = 0;
    for (int64_t i = found; i < count; i++)
        values[i] = -__builtin_inff();
    maxima_of(values, count, room->groups, room->maxima);
    float least = kth_greatest(room->maxima, room->groups, k);
    for (int64_t i = 0; i < found; i++) {
        values[kept] = values[i], room->places[kept] = room->places[i];
        kept += !(values[i] < least);
    }
    return kept;
}

/* The k greatest of scores[0..n) with their places, in order; there is room behind them for a whole block. The k-th
   greatest of the maxima of at least k groups is at most the k-th greatest of all. */
static void best_of(float *scores, const struct search *f, int64_t t, const float *query, const struct room *room,
                    int64_t *best) {
    int64_t n = f->n, count = UP(n, WIDTH);
    for (int64_t i = n; i < count; i++)
        scores[i] = -__builtin_inff();
    maxima_of(scores, count, room->groups, room->maxima);
    float off = doubt(&room->packed, t);
    int64_t found = survivors(scores, count, kth_greatest(room->maxima, room->groups, f->k) - off, room->places);
    while (room->places[found - 1] >= n)
        found--;
    if (off == 0)
        at_places(scores, room->places, found, room->values);
    else
        true_scores(&room->packed, query, room->places, found, room->values);
    if (off != 0 && found > 2 * room->groups)
        found = still_there(room, found, f->k);
    in_order(room->values, room->places, found, room->some);
    memcpy(best, room->some, f->k * sizeof *best);
}

static void search_side(const struct search *f, struct room *room, int64_t head, int64_t first, int64_t count,
                        int side) {
    int64_t row = f->h * 2 * f->half;
    const float *query = f->query + first * row + (head * 2 + side) * f->half;
    pack_keys(f->keys + (side * f->h + head) * f->n * f->half, &room->packed);
    for (int64_t t = 0; t < count; t += TOKENS) {
        int64_t now = count - t < TOKENS ? count - t : TOKENS;
        score(query + t * row, row, now, &room->packed, room->scores, room->stride);
        for (int64_t i = 0; i < now; i++)
            best_of(room->scores + i * room->stride, f, i, query + (t + i) * row, room,
                    room->best + (side * f->part + t + i) * f->k);
    }
}

/* values[index[0..WIDTH)] of `count` values, whose last vector is whole. */
static inline vec looked_up(const float *values, int64_t count, const int32_t *index) {
#if defined(__AVX512F__)
    __m512i at = _mm512_loadu_si512(index);
    if (count <= 16)
        return (vec)_mm512_permutexvar_ps(at, _mm512_loadu_ps(values));
    return (vec)_mm512_i32gather_ps(at, values, 4);
#else
    (void)count;
    vec v;
    for (int i = 0; i < WIDTH; i++)
        v[i] = values[index[i]];
    return v;
#endif
}

/* At most the k-th best sum: at least k pairs are as good as (p, reach of p), for every p. Infinities of both signs add
   up to what is not a number, and pairs before it may be worse. */
static float least_sum(const struct room *room, const float *a, const float *b, int64_t k) {
    vec least = (vec){0} - __builtin_inff();
    for (int64_t p = 0; p < k; p += WIDTH) {
        vec sum = load(a + p) + looked_up(b, k, room->reach + p);
        ivec in;
        for (int i = 0; i < WIDTH; i++)
            in[i] = p + i < k ? -1 : 0;
        least = choose(in, greater(sum, least), least);
    }
    return greatest_of(least);
}

static void best_sums(const struct search *f, struct room *room, const int64_t *left, const int64_t *right,
                      float *scores, int64_t *ids) {
    float *a = room->sides, *b = a + UP(f->k, WIDTH);
    int64_t padded = UP(room->n_pairs, WIDTH);
    for (int64_t j = 0; j < f->k; j++)
        a[j] = score_of(left[j]), b[j] = score_of(right[j]);
    for (int64_t c = 0; c < padded; c += WIDTH)
        store(room->sums + c, looked_up(a, f->k, room->p + c) + looked_up(b, f->k, room->r + c));
    for (int64_t c = room->n_pairs; c < padded; c++)
        room->sums[c] = -__builtin_inff();
    int64_t found = survivors(room->sums, padded, least_sum(room, a, b, f->k), room->places);
    at_places(room->sums, room->places, found, room->values);
    in_order(room->values, room->places, found, room->some);
    for (int64_t j = 0; j < f->k; j++) {
        int64_t pair = place_of(room->some[j]);
        scores[j] = score_of(room->some[j]);
        ids[j] = place_of(left[room->p[pair]]) * f->n + place_of(right[room->r[pair]]);
    }
}

/* Item: `part` tokens of one head. */
KERNEL(product_key_topk)(const void *fields, int64_t begin, int64_t end) {
    const struct search *f = fields;
    int64_t parts = (f->t + f->part - 1) / f->part;
    struct room room = room_for(f);
    for (int64_t item = begin; item < end; item++) {
        int64_t head = item / parts, first = item % parts * f->part;
        int64_t count = f->t - first < f->part ? f->t - first : f->part;
        for (int side = 0; side < 2; side++)
            search_side(f, &room, head, first, count, side);
        for (int64_t t = 0; t < count; t++) {
            int64_t at = ((first + t) * f->h + head) * f->k;
            const int64_t *left = room.best + t * f->k;
            best_sums(f, &room, left, left + f->part * f->k, f->scores + at, f->ids + at);
        }
    }
    free_room(&room);
}
