/* y[t] += Σ_a w_a · scaling_a · B_a (A_a x[t]): the tokens of a batch, each through its own adapters, on a CPU.

   loradeck/ops/cpu.py compiles, checks and calls this. Weights are read where their adapter keeps them, at its own rank.
   A token reads the weights of its own adapters only, and the order of its sums does not depend on the other tokens.

   T tokens   K pairs of a token and an adapter   S segments: adapters in use, each with its tokens   M adapters
   I features in   O features out   r an adapter's rank   R the largest of them                                      */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16 /* numbers in a vector */
#define ROWS 4   /* tokens computed together; ROWS · RANKS sums fit into the registers */
#else
#define LANES 8
#define ROWS 2
#endif
#define RANKS 4
#define BLOCK 96    /* features out whose part of B is transposed at once, and stays in the nearest cache */
#define SMALL 32768 /* products that one thread computes before a second one has started */

typedef float f32;
typedef f32 vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t vec_u16 __attribute__((vector_size(2 * LANES)));
typedef f32 eight __attribute__((vector_size(32)));
typedef uint32_t eight_u32 __attribute__((vector_size(32)));
typedef uint16_t eight_u16 __attribute__((vector_size(16)));

/* `half` says here and below that numbers are bfloat16, the upper half of a float32. It is a constant wherever it
   matters, so each function is compiled for either. */
typedef struct {
    const void *a, *b; /* (r, I), (O, r) */
    int64_t r, half;   /* r is 0 where an adapter leaves the layer alone */
} Weights;

typedef struct { /* CSegments in segments.py */
    const int64_t *token_indices; /* (K) sorted by adapter */
    const f32 *weights;           /* (K) */
    const int64_t *starts;        /* (S + 1): the pairs of segment s are starts[s] to starts[s + 1] - 1 */
    const int64_t *adapters;      /* (S) */
    int64_t pairs, count;         /* K, S */
} Segments;

typedef struct {
    const Segments *segments;
    const Weights *table; /* (M) */
    const f32 *scaling;   /* (M) */
    const void *x;        /* (T, I) */
    void *y;              /* (T, O) */
    int64_t inside, outside, ranks, half;
    f32 *h;          /* (K, R) */
    f32 *transposed; /* (R, BLOCK) for each thread */
} Call;

/* The entry points of the OpenMP runtime that torch has loaded: libgomp, or LLVM's libomp, which has them too. GCC
   would emit these calls for `#pragma omp`; Clang would emit others, which libgomp does not have. */
extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

INLINE int64_t bytes(int half) { return half ? 2 : 4; }

INLINE vec load(const void *from, int64_t at, int half) {
    vec out;
    if (half) {
        vec_u16 upper;
        memcpy(&upper, (const uint16_t *)from + at, sizeof upper);
        return (vec)(__builtin_convertvector(upper, vec_u32) << 16);
    }
    memcpy(&out, (const f32 *)from + at, sizeof out);
    return out;
}

INLINE eight load_eight(const void *from, int64_t at, int half) {
    eight out;
    if (half) {
        eight_u16 upper;
        memcpy(&upper, (const uint16_t *)from + at, sizeof upper);
        return (eight)(__builtin_convertvector(upper, eight_u32) << 16);
    }
    memcpy(&out, (const f32 *)from + at, sizeof out);
    return out;
}

INLINE f32 load_one(const void *from, int64_t at, int half) {
    f32 out;
    uint32_t bits;
    if (!half) return ((const f32 *)from)[at];
    bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    memcpy(&out, &bits, sizeof out);
    return out;
}

INLINE void store(void *to, int64_t at, vec value, int half) {
    if (half) { /* to nearest even; a NaN stays a NaN */
        vec_u32 bits = (vec_u32)value, nan = (vec_u32)(value != value);
        vec_u32 near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        vec_u16 upper = __builtin_convertvector((near & ~nan) | (0x7fc0 & nan), vec_u16);
        memcpy((uint16_t *)to + at, &upper, sizeof upper);
    } else {
        memcpy((f32 *)to + at, &value, sizeof value);
    }
}

INLINE f32 total(vec value) {
    f32 lanes[LANES];
    memcpy(lanes, &value, sizeof value);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}

/* h[k + m, j + n] = weight · scaling · (A[j + n] x[token_{k + m}]) for m < rows, n < ranks. */
INLINE void dots(const Call *c, const Weights *w, f32 scaling, int64_t k, int64_t j, int rows, int ranks, int half,
                 int a_half) {
    const int64_t I = c->inside;
    const Segments *s = c->segments;
    const void *a = (const char *)w->a + j * I * bytes(a_half);
    const char *row[ROWS];
    vec sums[ROWS][RANKS];
    int64_t i = 0;
    for (int m = 0; m < rows; m++) {
        row[m] = (const char *)c->x + s->token_indices[k + m] * I * bytes(half);
        for (int n = 0; n < ranks; n++) sums[m][n] = (vec){0};
    }
    for (; i + LANES <= I; i += LANES) {
        vec x[ROWS];
        for (int m = 0; m < rows; m++) x[m] = load(row[m], i, half);
        for (int n = 0; n < ranks; n++) {
            vec rank = load(a, n * I + i, a_half);
            for (int m = 0; m < rows; m++) sums[m][n] += x[m] * rank;
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < ranks; n++) {
            f32 sum = total(sums[m][n]);
            for (int64_t rest = i; rest < I; rest++)
                sum += load_one(row[m], rest, half) * load_one(a, n * I + rest, a_half);
            c->h[(k + m) * c->ranks + j + n] = s->weights[k + m] * scaling * sum;
        }
}

/* The pairs k to stop - 1, up to ROWS of one segment, at up to RANKS ranks from j on. */
INLINE void shrink(const Call *c, const Weights *w, f32 scaling, int64_t k, int64_t stop, int64_t j, int half,
                   int a_half) {
    if (j + RANKS > w->r) {
        for (; k < stop; k++)
            for (int64_t n = j; n < w->r; n++) dots(c, w, scaling, k, n, 1, 1, half, a_half);
    } else if (stop - k == ROWS) {
        dots(c, w, scaling, k, j, ROWS, RANKS, half, a_half);
    } else {
        for (; k < stop; k++) dots(c, w, scaling, k, j, 1, RANKS, half, a_half);
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(one, two, ...) __builtin_shufflevector(one, two, __VA_ARGS__)
#endif
#endif
#ifndef PICK /* GCC before 12 */
#define PICK(one, two, ...) __builtin_shuffle(one, two, (eight_u32){__VA_ARGS__})
#endif

/* Take the even numbers of each two vectors, and the odd ones. Done three times, this transposes 8 x 8 numbers. */
INLINE void unzip(const eight *from, eight *to) {
    for (int n = 0; n < 4; n++) {
        to[n] = PICK(from[2 * n], from[2 * n + 1], 0, 2, 4, 6, 8, 10, 12, 14);
        to[n + 4] = PICK(from[2 * n], from[2 * n + 1], 1, 3, 5, 7, 9, 11, 13, 15);
    }
}

/* to (r, BLOCK) = B[o : o + size] transposed, zeros after `size`. */
INLINE void transpose(f32 *to, const Weights *w, int64_t o, int64_t size, int b_half) {
    const int64_t r = w->r, eights = r / 8 * 8, whole = size / 8 * 8;
    const void *b = (const char *)w->b + o * r * bytes(b_half);
    if (size < BLOCK) memset(to, 0, r * BLOCK * sizeof *to);
    for (int64_t c = 0; c < whole; c += 8)
        for (int64_t j = 0; j < eights; j += 8) {
            eight one[8], two[8];
            for (int n = 0; n < 8; n++) one[n] = load_eight(b, (c + n) * r + j, b_half);
            unzip(one, two);
            unzip(two, one);
            unzip(one, two);
            for (int n = 0; n < 8; n++) memcpy(to + (j + n) * BLOCK + c, two + n, sizeof *two);
        }
    for (int64_t c = 0; c < size; c++)
        for (int64_t j = c < whole ? eights : 0; j < r; j++) to[j * BLOCK + c] = load_one(b, c * r + j, b_half);
}

/* y[token_k, o : o + BLOCK] += h[k] B for all pairs. */
INLINE void expand(const Call *c, f32 *transposed, int64_t o, int half) {
    const Segments *s = c->segments;
    const int64_t O = c->outside, size = O - o < BLOCK ? O - o : BLOCK;
    for (int64_t n = 0; n < s->count; n++) {
        const Weights *w = c->table + s->adapters[n];
        if (!w->r) continue;
        if (w->half) transpose(transposed, w, o, size, 1);
        else transpose(transposed, w, o, size, 0);
        for (int64_t k = s->starts[n]; k < s->starts[n + 1]; k++) {
            char *row = (char *)c->y + (s->token_indices[k] * O + o) * bytes(half), edge[BLOCK * sizeof(f32)];
            char *at = size == BLOCK ? row : edge; /* what lies after y's end is not ours */
            vec sums[BLOCK / LANES];
            if (size < BLOCK) memcpy(memset(edge, 0, sizeof edge), row, size * bytes(half));
            for (int v = 0; v < BLOCK / LANES; v++) sums[v] = (vec){0}; /* not y: rounding would be as large as y is */
            for (int64_t j = 0; j < w->r; j++)
                for (int v = 0; v < BLOCK / LANES; v++)
                    sums[v] += c->h[k * c->ranks + j] * load(transposed, j * BLOCK + v * LANES, 0);
            for (int v = 0; v < BLOCK / LANES; v++) store(at, v * LANES, load(at, v * LANES, half) + sums[v], half);
            if (size < BLOCK) memcpy(row, edge, size * bytes(half));
        }
    }
}

/* Part `thread` of the products with A: steps of up to ROWS pairs at up to RANKS ranks, evenly over the threads. */
INLINE void shrink_part(const Call *c, int64_t thread, int64_t threads, int half) {
    const Segments *s = c->segments;
    int64_t all = 0, before = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t n = 0; n < s->count; n++) {
            const int64_t adapter = s->adapters[n], start = s->starts[n], stop = s->starts[n + 1];
            const Weights *w = c->table + adapter;
            const int64_t over_ranks = (w->r + RANKS - 1) / RANKS;
            const int64_t steps = (stop - start + ROWS - 1) / ROWS * over_ranks;
            if (!pass) {
                all += steps;
                continue;
            }
            int64_t step = all * thread / threads - before, last = all * (thread + 1) / threads - before;
            if (step < 0) step = 0;
            if (last > steps) last = steps;
            before += steps;
            for (; step < last; step++) {
                const int64_t k = start + step / over_ranks * ROWS, j = step % over_ranks * RANKS;
                const int64_t end = k + ROWS < stop ? k + ROWS : stop;
                if (w->half) shrink(c, w, c->scaling[adapter], k, end, j, half, 1);
                else shrink(c, w, c->scaling[adapter], k, end, j, half, 0);
            }
        }
}

INLINE void part(const Call *c, int64_t thread, int64_t threads, int half) {
    const int64_t blocks = (c->outside + BLOCK - 1) / BLOCK;
    shrink_part(c, thread, threads, half);
    if (threads > 1) GOMP_barrier();
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++)
        expand(c, c->transposed + thread * c->ranks * BLOCK, block * BLOCK, half);
}

static void run(const Call *c, int64_t thread, int64_t threads) {
    if (c->half) part(c, thread, threads, 1);
    else part(c, thread, threads, 0);
}

static void run_in_team(void *call) { run(call, omp_get_thread_num(), omp_get_num_threads()); }

/* x and y are float32, or bfloat16 where `half`. Returns 0, or 1 if memory ran out; y is unchanged then. */
int lora(const Segments *segments, const Weights *table, const f32 *scaling, const void *x, void *y, int64_t inside,
         int64_t outside, int half, int threads) {
    Call c = {segments, table, scaling, x, y, inside, outside, 0, half, 0, 0};
    for (int64_t n = 0; n < segments->count; n++) {
        const int64_t r = table[segments->adapters[n]].r;
        if (r > c.ranks) c.ranks = r;
    }
    if (!c.ranks) return 0;
    if (segments->pairs * c.ranks * (inside + outside) <= SMALL) threads = 1;
    const int64_t size = (segments->pairs + threads * BLOCK) * c.ranks * (int64_t)sizeof *c.h;
    c.transposed = aligned_alloc(64, (size + 63) / 64 * 64); /* so that no vector of it crosses a cache line */
    if (!c.transposed) return 1;
    c.h = c.transposed + threads * BLOCK * c.ranks;
    if (threads > 1) GOMP_parallel(run_in_team, &c, threads, 0);
    else run(&c, 0, 1);
    free(c.transposed);
    return 0;
}
