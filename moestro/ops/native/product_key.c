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

/* The k best of some rows, in order. */
struct best {
    float *scores;   /* [rows, wide], -infinity past k */
    int32_t *places; /* [rows, wide], anything past k */
};

/* What one thread needs. */
struct room {
    struct packed packed;
    struct best sides[2];  /* keys, of each token of a part */
    struct best pairs;     /* of TOKENS tokens */
    float *scores;         /* [TOKENS, stride] */
    float *maxima;         /* [WIDTH, groups]; groups are a multiple of WIDTH */
    vec *columns;          /* [groups] */
    float *values;         /* [TOKENS, most] what may be among the k best */
    int32_t *places;       /* likewise */
    int64_t found[TOKENS]; /* how many that is */
    int64_t *items;        /* as `in_order` wants it */
    int32_t *p, *r;        /* [padded pairs] the pairs that can be among the k best sums */
    int32_t *reach;        /* [padded k] the least r such that k pairs or more are as good as (p, r) */
    float *sums;           /* [padded pairs] */
    int64_t n_pairs, stride, groups, wide, most;
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

static struct best best_rows(int64_t rows, int64_t wide) {
    int64_t count = rows * wide;
    struct best best = {malloc(count * sizeof *best.scores), malloc(count * sizeof *best.places)};
    require_memory(best.scores && best.places);
    for (int64_t i = 0; i < count; i++)
        best.scores[i] = -__builtin_inff();
    return best;
}

static void free_best(const struct best *best) { free(best->scores), free(best->places); }

static struct room room_for(const struct search *f) {
    int64_t pairs = staircase(f->k, NULL), padded = UP(pairs, WIDTH), k = UP(f->k, WIDTH);
    int64_t most = (whole_blocks(f->n) > padded ? whole_blocks(f->n) : padded) + WIDTH;
    struct room room = {
        .packed = room_for_keys(f->n, f->half), .groups = UP(2 * f->k, WIDTH), .n_pairs = pairs,
        .stride = whole_blocks(f->n) + WIDTH /* rows a page apart would push each other out of the cache */,
        .wide = UP(f->k + 1, WIDTH), .most = most};
    room.scores = malloc(TOKENS * room.stride * sizeof *room.scores);
    room.maxima = calloc(WIDTH * room.groups, sizeof *room.maxima);
    room.columns = aligned_alloc(64, room.groups * sizeof *room.columns);
    room.places = malloc(TOKENS * most * sizeof *room.places);
    room.values = malloc(TOKENS * most * sizeof *room.values);
    room.items = malloc(most * sizeof *room.items);
    room.p = calloc(2 * padded + k, sizeof *room.p);
    room.sums = malloc(padded * sizeof *room.sums);
    require_memory(room.scores && room.maxima && room.columns && room.places && room.values && room.items && room.p &&
                   room.sums);
    room.r = room.p + padded, room.reach = room.r + padded;
    staircase(f->k, &room);
    room.sides[0] = best_rows(f->part, room.wide), room.sides[1] = best_rows(f->part, room.wide);
    room.pairs = best_rows(TOKENS, room.wide);
    return room;
}

static void free_room(struct room *room) {
    free_keys(&room->packed), free(room->scores), free(room->maxima), free(room->columns), free(room->places);
    free(room->values), free(room->items), free(room->p), free(room->sums);
    free_best(&room->sides[0]), free_best(&room->sides[1]), free_best(&room->pairs);
}

/* Where a bound left many: those that a better one leaves, and how many. */
static int64_t still_there(const struct room *room, float *values, int32_t *places, int64_t found, int64_t k) {
    int64_t count = UP(found, WIDTH), kept = 0;
    for (int64_t i = found; i < count; i++)
        values[i] = -__builtin_inff();
    maxima_of(values, count, room->groups, room->maxima);
    for (int64_t g = 0; g < room->groups; g++)
        room->columns[g] = (vec){0} + room->maxima[g];
    float least = kth_greatest(room->columns, room->groups, k)[0];
    for (int64_t i = 0; i < found; i++) {
        values[kept] = values[i], places[kept] = places[i];
        kept += !(values[i] < least);
    }
    return kept;
}

/* bounds[0..WIDTH): of each row of scores a number that at least k are not less than: at most the k-th greatest of the
   maxima of at least k groups. */
static void bounds_of(float *scores, int64_t rows, const struct search *f, const struct room *room, float *bounds) {
    int64_t n = f->n, count = UP(n, WIDTH);
    for (int64_t t = 0; t < rows; t++) {
        float *row = scores + t * room->stride;
        for (int64_t i = n; i < count; i++)
            row[i] = -__builtin_inff();
        maxima_of(row, count, room->groups, room->maxima + t * room->groups);
    }
    for (int64_t t = rows; t < WIDTH; t++) /* what is not there must not be searched for longer than what is */
        memcpy(room->maxima + t * room->groups, room->maxima, room->groups * sizeof *room->maxima);
    for (int64_t g = 0; g < room->groups; g += WIDTH)
        to_columns(room->maxima + g, room->groups, room->columns + g);
    store(bounds, kth_greatest(room->columns, room->groups, f->k));
}

/* Finds those of scores[0..n) of token t that may be among the k greatest. */
static void keep_best(const float *scores, float bound, const struct search *f, int64_t t, const float *query,
                      struct room *room) {
    int32_t *places = room->places + t * room->most;
    float *values = room->values + t * room->most, off = doubt(&room->packed, t);
    int64_t found = survivors(scores, UP(f->n, WIDTH), bound - off, places, off == 0 ? values : NULL);
    while (places[found - 1] >= f->n)
        found--;
    if (off != 0)
        true_scores(&room->packed, query, places, found, values);
    if (found > 2 * room->groups)
        found = still_there(room, values, places, found, f->k);
    room->found[t] = found;
}

/* Row `row` of `best`: the k best of what was found for token t, in order. */
static void settle(const struct search *f, const struct room *room, int64_t t, const struct best *best, int64_t row) {
    int64_t first = t * room->most, to = row * room->wide;
    in_order(room->values + first, room->places + first, room->found[t], f->k, room->items, best->scores + to,
             best->places + to);
}

static void search_side(const struct search *f, struct room *room, int64_t head, int64_t first, int64_t count,
                        int side) {
    int64_t row = f->h * 2 * f->half;
    const float *query = f->query + first * row + (head * 2 + side) * f->half;
    pack_keys(f->keys + (side * f->h + head) * f->n * f->half, &room->packed);
    for (int64_t t = 0; t < count; t += TOKENS) {
        int64_t now = count - t < TOKENS ? count - t : TOKENS;
        score(query + t * row, row, now, &room->packed, room->scores, room->stride);
        float bounds[TOKENS];
        for (int64_t i = 0; i < now; i += WIDTH)
            bounds_of(room->scores + i * room->stride, now - i < WIDTH ? now - i : WIDTH, f, room, bounds + i);
        for (int64_t i = 0; i < now; i++)
            keep_best(room->scores + i * room->stride, bounds[i], f, i, query + (t + i) * row, room);
        for (int64_t i = 0; i < now; i++)
            settle(f, room, i, &room->sides[side], t + i);
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
    for (int64_t p = 0; p < k; p += WIDTH)
        least = greater(load(a + p) + looked_up(b, k, room->reach + p), least);
    return greatest_of(least);
}

/* Finds for token t of a block, which is token `of_part` of its part, the sums that may be among the k greatest. */
static void keep_best_sums(const struct search *f, struct room *room, int64_t t, int64_t of_part) {
    int64_t first = of_part * room->wide, to = t * room->most, padded = UP(room->n_pairs, WIDTH);
    const float *a = room->sides[0].scores + first, *b = room->sides[1].scores + first;
    for (int64_t c = 0; c < padded; c += WIDTH)
        store(room->sums + c, looked_up(a, f->k, room->p + c) + looked_up(b, f->k, room->r + c));
    for (int64_t c = room->n_pairs; c < padded; c++)
        room->sums[c] = -__builtin_inff();
    float least = least_sum(room, a, b, f->k);
    room->found[t] = survivors(room->sums, padded, least, room->places + to, room->values + to);
}

/* The result for `count` tokens of a head: the k best sums of the two sides' best keys. */
static void best_sums(const struct search *f, struct room *room, int64_t head, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t += TOKENS) {
        int64_t now = count - t < TOKENS ? count - t : TOKENS;
        for (int64_t i = 0; i < now; i++)
            keep_best_sums(f, room, i, t + i);
        for (int64_t i = 0; i < now; i++)
            settle(f, room, i, &room->pairs, i);
        for (int64_t i = 0; i < now; i++) {
            const float *scores = room->pairs.scores + i * room->wide;
            const int32_t *pairs = room->pairs.places + i * room->wide;
            const int32_t *left = room->sides[0].places + (t + i) * room->wide;
            const int32_t *right = room->sides[1].places + (t + i) * room->wide;
            int64_t at = ((first + t + i) * f->h + head) * f->k;
            for (int64_t j = 0; j < f->k; j++) {
                f->scores[at + j] = scores[j];
                f->ids[at + j] = left[room->p[pairs[j]]] * f->n + right[room->r[pairs[j]]];
            }
        }
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
        best_sums(f, &room, head, first, count);
    }
    free_room(&room);
}
