/* y[t] += Σ_a w_a · scaling_a · B_a (A_a x[t]): rows of a batch, each through its own adapters, on a CPU.

   Knows numbers and where they lie; knows no torch. loradeck/ops/cpu.py compiles it, tries it and calls it.
   Each pair is read where its adapter keeps it, at its own rank. A row reads its own pairs and no other, and the order
   of its sums does not depend on the rows beside it.

   T items   K meetings of an item with a pair   S pairs that are met   U units, up to ROWS meetings of one pair
   I features in   O features out   r a pair's rank   R the largest of them                                          */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16 /* numbers of a vector */
#define ROWS 4   /* of a unit; ROWS · RANKS sums fit into the registers */
#else
#define LANES 8
#define ROWS 2
#endif
#define RANKS 4
#define BLOCK 96      /* features out whose part of B is turned at once, and stays in the nearest cache */
#define SMALL 32768   /* products that one thread computes before a second has begun */

typedef float f32;
typedef f32 vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef f32 eight __attribute__((vector_size(32)));
typedef uint32_t eight_words __attribute__((vector_size(32)));
typedef uint16_t eight_halves __attribute__((vector_size(16)));

/* `half` says here and below that numbers are bfloat16, the upper half of a float32. It is a constant wherever it
   matters, so each of these is compiled for either. */
typedef struct {
    const void *a, *b; /* (r, I), (O, r) */
    int64_t r, half;
    f32 scaling;
} Pair;

typedef struct {
    const Pair *pairs;        /* (S); r is 0 where an adapter leaves the layer alone */
    const int64_t *item;      /* (K) */
    const f32 *weight;        /* (K) */
    const int64_t *first;     /* (S + 1): the meetings of the s-th pair are first[s] to first[s + 1] - 1 */
    const int64_t *unit_pair; /* (U) */
    const int64_t *unit;      /* (U + 1), likewise */
    int64_t meetings, met, units, inside, outside, ranks, half;
} Batch;

int64_t rows_of_a_unit(void) { return ROWS; }

ALWAYS int64_t bytes(int half) { return half ? 2 : 4; }

ALWAYS vec load(const void *from, int64_t at, int half) {
    vec out;
    if (half) {
        halves own;
        memcpy(&own, (const uint16_t *)from + at, sizeof own);
        return (vec)(__builtin_convertvector(own, words) << 16);
    }
    memcpy(&out, (const f32 *)from + at, sizeof out);
    return out;
}

ALWAYS eight load_eight(const void *from, int64_t at, int half) {
    eight out;
    if (half) {
        eight_halves own;
        memcpy(&own, (const uint16_t *)from + at, sizeof own);
        return (eight)(__builtin_convertvector(own, eight_words) << 16);
    }
    memcpy(&out, (const f32 *)from + at, sizeof out);
    return out;
}

ALWAYS f32 load_one(const void *from, int64_t at, int half) {
    f32 out;
    uint32_t bits;
    if (!half) return ((const f32 *)from)[at];
    bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    memcpy(&out, &bits, sizeof out);
    return out;
}

ALWAYS void store(void *to, int64_t at, vec value, int half) {
    if (half) { /* to the nearest, of two equally near to the even one; a NaN stays one */
        words bits = (words)value, nan = (words)(value != value);
        words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        halves own = __builtin_convertvector((near & ~nan) | (0x7fc0 & nan), halves);
        memcpy((uint16_t *)to + at, &own, sizeof own);
    } else {
        memcpy((f32 *)to + at, &value, sizeof value);
    }
}

ALWAYS f32 total(vec value) {
    f32 lanes[LANES];
    memcpy(lanes, &value, sizeof value);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}

/* h[k + m, j + n] = weight · scaling · (A[j + n] x[item_{k + m}]) for m < rows, n < ranks. */
ALWAYS void dots(const Batch *c, const void *x, f32 *h, const Pair *p, int64_t k, int64_t j, int rows, int ranks,
                 int half, int a_half) {
    const int64_t I = c->inside;
    const void *a = (const char *)p->a + j * I * bytes(a_half);
    const char *row[ROWS];
    vec sums[ROWS][RANKS];
    int64_t i = 0;
    for (int m = 0; m < rows; m++) {
        row[m] = (const char *)x + c->item[k + m] * I * bytes(half);
        for (int n = 0; n < ranks; n++) sums[m][n] = (vec){0};
    }
    for (; i + LANES <= I; i += LANES) {
        vec own[ROWS];
        for (int m = 0; m < rows; m++) own[m] = load(row[m], i, half);
        for (int n = 0; n < ranks; n++) {
            vec rank = load(a, n * I + i, a_half);
            for (int m = 0; m < rows; m++) sums[m][n] += own[m] * rank;
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < ranks; n++) {
            f32 sum = total(sums[m][n]);
            for (int64_t rest = i; rest < I; rest++)
                sum += load_one(row[m], rest, half) * load_one(a, n * I + rest, a_half);
            h[(k + m) * c->ranks + j + n] = c->weight[k + m] * p->scaling * sum;
        }
}

/* The meetings of a unit, at up to RANKS ranks from j on. */
ALWAYS void shrink(const Batch *c, const void *x, f32 *h, int64_t unit, int64_t j, int half, int a_half) {
    const Pair *p = c->pairs + c->unit_pair[unit];
    const int64_t stop = c->unit[unit + 1];
    int64_t k = c->unit[unit];
    if (j + RANKS > p->r) {
        for (; k < stop; k++)
            for (int64_t n = j; n < p->r; n++) dots(c, x, h, p, k, n, 1, 1, half, a_half);
    } else if (stop - k == ROWS) {
        dots(c, x, h, p, k, j, ROWS, RANKS, half, a_half);
    } else {
        for (; k < stop; k++) dots(c, x, h, p, k, j, 1, RANKS, half, a_half);
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(one, two, ...) __builtin_shufflevector(one, two, __VA_ARGS__)
#endif
#endif
#ifndef PICK /* GCC before 12 */
#define PICK(one, two, ...) __builtin_shuffle(one, two, (eight_words){__VA_ARGS__})
#endif

/* Take the even numbers of each two vectors, and the odd ones. Three times over, that turns 8 x 8 numbers. */
ALWAYS void unzip(const eight *from, eight *to) {
    for (int n = 0; n < 4; n++) {
        to[n] = PICK(from[2 * n], from[2 * n + 1], 0, 2, 4, 6, 8, 10, 12, 14);
        to[n + 4] = PICK(from[2 * n], from[2 * n + 1], 1, 3, 5, 7, 9, 11, 13, 15);
    }
}

/* turned (r, BLOCK) = B[o : o + size] turned, zeros after `size`. */
ALWAYS void turn(f32 *turned, const Pair *p, int64_t o, int64_t size, int b_half) {
    const int64_t r = p->r, eights = r / 8 * 8, whole = size / 8 * 8;
    const void *own = (const char *)p->b + o * r * bytes(b_half);
    if (size < BLOCK) memset(turned, 0, r * BLOCK * sizeof *turned);
    for (int64_t c = 0; c < whole; c += 8)
        for (int64_t j = 0; j < eights; j += 8) {
            eight one[8], two[8];
            for (int n = 0; n < 8; n++) one[n] = load_eight(own, (c + n) * r + j, b_half);
            unzip(one, two);
            unzip(two, one);
            unzip(one, two);
            for (int n = 0; n < 8; n++) memcpy(turned + (j + n) * BLOCK + c, two + n, sizeof *two);
        }
    for (int64_t c = 0; c < size; c++)
        for (int64_t j = c < whole ? eights : 0; j < r; j++) turned[j * BLOCK + c] = load_one(own, c * r + j, b_half);
}

/* y[item_k, o : o + BLOCK] += h[k] B for all meetings. */
ALWAYS void expand(const Batch *c, void *y, const f32 *h, f32 *turned, int64_t o, int half) {
    const int64_t O = c->outside, size = O - o < BLOCK ? O - o : BLOCK;
    for (int64_t s = 0; s < c->met; s++) {
        const Pair *p = c->pairs + s;
        if (!p->r) continue;
        if (p->half) turn(turned, p, o, size, 1);
        else turn(turned, p, o, size, 0);
        for (int64_t k = c->first[s]; k < c->first[s + 1]; k++) {
            char *own = (char *)y + (c->item[k] * O + o) * bytes(half), edge[BLOCK * sizeof(f32)];
            char *at = size == BLOCK ? own : edge; /* what lies after y's end is not ours */
            vec sums[BLOCK / LANES];
            if (size < BLOCK) memcpy(memset(edge, 0, sizeof edge), own, size * bytes(half));
            for (int v = 0; v < BLOCK / LANES; v++) sums[v] = (vec){0}; /* not y: rounding would be as large as y is */
            for (int64_t j = 0; j < p->r; j++)
                for (int v = 0; v < BLOCK / LANES; v++)
                    sums[v] += h[k * c->ranks + j] * load(turned, j * BLOCK + v * LANES, 0);
            for (int v = 0; v < BLOCK / LANES; v++) store(at, v * LANES, load(at, v * LANES, half) + sums[v], half);
            if (size < BLOCK) memcpy(own, edge, size * bytes(half));
        }
    }
}

ALWAYS int update(const Batch *c, const void *x, void *y, int threads, int half) {
    const int64_t steps = (c->ranks + RANKS - 1) / RANKS;
    f32 *h = malloc(c->meetings * c->ranks * sizeof *h);
    int failed = !h;
    if (h) {
#pragma omp parallel num_threads(threads) if (c->meetings * c->ranks * (c->inside + c->outside) > SMALL)
        {
            f32 *turned = malloc(c->ranks * BLOCK * sizeof *turned);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < c->units * steps; n++) {
                int64_t unit = n / steps, j = n % steps * RANKS;
                if (c->pairs[c->unit_pair[unit]].half) shrink(c, x, h, unit, j, half, 1);
                else shrink(c, x, h, unit, j, half, 0);
            }
#pragma omp for schedule(static)
            for (int64_t o = 0; o < c->outside; o += BLOCK) {
                if (turned) expand(c, y, h, turned, o, half);
                else
#pragma omp atomic write
                    failed = 1;
            }
            free(turned);
        }
    }
    free(h);
    return failed;
}

/* x (T, I), y (T, O), both of the batch's dtype. Returns 0, or 1 where memory ran out and y is not to be used. */
int lora(const Batch *c, const void *x, void *y, int threads) {
    return c->half ? update(c, x, y, threads, 1) : update(c, x, y, threads, 0);
}
