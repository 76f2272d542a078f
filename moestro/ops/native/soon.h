/* Memory that is asked for while something else is computed. */

#ifndef MOESTRO_SOON_H
#define MOESTRO_SOON_H

#include <immintrin.h>
#include <stdint.h>

/* Memory that will be read soon, region after region, and how many lines of it to ask for with every tile. */
struct soon {
    struct region {
        const char *from;
        int64_t lines, step, run, at; /* bytes between runs of lines that follow each other; the line of its run */
    } regions[6];
    int64_t count, now, at_once;
};

static inline void add_region(struct soon *soon, const void *from, int64_t lines, int64_t step, int64_t run) {
    soon->regions[soon->count++] = (struct region){from, lines, step, run, 0};
}

/* Lines that all follow each other. */
static inline void add_lines(struct soon *soon, const void *from, int64_t lines) {
    add_region(soon, from, lines, 64, 1);
}

/* All of it with so many tiles. */
static inline void spread_over(struct soon *soon, int64_t tiles) {
    int64_t lines = 0;
    for (int64_t i = 0; i < soon->count; i++)
        lines += soon->regions[i].lines;
    soon->at_once = tiles ? (lines + tiles - 1) / tiles : 0;
}

static inline void ask(struct soon *soon) {
    for (int64_t i = 0; i < soon->at_once; i++) {
        while (soon->now < soon->count && !soon->regions[soon->now].lines)
            soon->now++;
        if (soon->now == soon->count)
            return;
        struct region *region = soon->regions + soon->now;
        _mm_prefetch(region->from, _MM_HINT_T1);
        region->at = region->at + 1 == region->run ? 0 : region->at + 1;
        region->from += region->at ? 64 : region->step - 64 * (region->run - 1);
        region->lines--;
    }
}

#endif
