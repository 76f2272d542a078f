/* Experts that are one core's each: their packed rows, hidden numbers and dz never leave its cache, and no core waits
   for another until all experts are done. */

#ifdef __AVX512F__

#include "tiles.h"

#define PHASE(name) KERNEL(name)(const void *fields, int64_t begin, int64_t end)
PHASE(tile_pack);
PHASE(tile_hidden);
PHASE(tile_rows);
PHASE(tile_gradients);

/* The worker's part of the memory that experts at work have. */
static struct tiles of_worker(const struct tiles *f, int64_t worker) {
    struct tiles own = *f;
    int64_t pieces = worker * f->pieces, packed = pieces * f->most_slots * UP_TO(f->d, DEEP);
    int64_t beside = pieces * f->most_slots * DEEP;
    uint16_t **rows[] = {&own.x_across, &own.x_along, &own.dy_across, &own.dy_along};
    for (int64_t i = 0; i < 4; i++)
        if (*rows[i])
            *rows[i] += packed;
    if (f->hidden)
        own.hidden += pieces * f->most_hidden + beside;
    if (f->dz)
        own.dz += 2 * pieces * f->most_hidden + beside;
    return own;
}

/* The forward pass of experts, or the backward pass, each by whichever worker is free: items are
   workers. What a worker computes of an expert depends on nothing but that expert. */
KERNEL(tile_whole)(const void *fields, int64_t begin, int64_t end) {
    const struct tiles *f = fields;
    int64_t columns = UP_TO(f->d, COLUMNS) / COLUMNS, at;
    for (int64_t worker = begin; worker < end; worker++) {
        struct tiles own = of_worker(f, worker);
        while ((at = __atomic_fetch_add(f->taken, 1, __ATOMIC_RELAXED)) < f->count) {
            const struct expert *e = f->experts + f->whole[at];
            int64_t number = f->whole[at], stop = e->block + e->wide / DEEP;
            NAMED(tile_pack, VARIANT)(&own, e->slot / DEEP, (e->slot + e->slots) / DEEP);
            if (f->forward)
                NAMED(tile_hidden, VARIANT)(&own, e->block, stop);
            else
                NAMED(tile_gradients, VARIANT)(&own, e->block, stop);
            if (f->forward || f->dz)
                NAMED(tile_rows, VARIANT)(&own, number * columns, (number + 1) * columns);
        }
    }
}

#endif
