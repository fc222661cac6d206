/* Causal attention of sequences that lie end to end in one row, for training: out = softmax(cap(scale · q kᵀ)) v of each
   sequence, and its gradients. Nothing of the size of a mask or of all scores is kept: the backward pass computes the
   scores again from the logarithm of their sums.

   varlen_attention.py checks and calls this. A unit of work is a head of a sequence, with sums in float32 and in one
   order, so results depend neither on the number of threads nor on the other sequences.

   T tokens   N query heads   D numbers of a head   n tokens of a sequence   R query rows computed at once             */

#include <stdatomic.h>
#include "numbers.h"

#define R 24 /* of which PART_ROWS · PART_VECTORS sums at a time are in registers */
#define PART_ROWS 6
#define PART_VECTORS (LANES == 16 ? 4 : 2)
#define KEYS 16 /* a row of scores is padded to a multiple of this */

typedef struct {
    void *at;
    i64 token, head; /* the way from one token, and head, to the next, in numbers */
} Rows;              /* (T, heads, D) */
typedef struct {     /* CVarlenAttention in varlen_attention.py */
    const i64 *starts; /* the sequence s has the tokens starts[s] to starts[s + 1] - 1 */
    const i64 *order;  /* sequences, the longest first */
    i64 count, tokens, longest;
    i64 heads, key_heads, dim, format, window; /* tokens seen, 0 for all */
    float scale, cap;                          /* cap: 0 for none */
    Rows q, k, v, out;
    float *log_sums; /* (N, T) */
    /* of the backward pass: */
    Rows grad, dq;
    float *dk, *dv; /* (T, N, D): each query head's part */
} Attention;
typedef struct {
    const Attention *a;
    i64 backward;
    char *scratch;
    i64 bytes; /* of scratch, for each thread */
    _Atomic i64 next;
} Work;
typedef struct {
    float *q, *grad, *sum;         /* (R, D) */
    float *scores, *dscores;       /* (R, n padded) */
    float *k, *v, *dk, *dv;        /* (n, D) */
    float *k_columns, *v_columns;  /* (D, n padded) */
} Scratch;

/* The entry points of the OpenMP runtime that torch has loaded. */
extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);

INLINE i64 padded(i64 tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }
INLINE char *row_at(const Rows *m, i64 token, i64 head, i64 format) {
    return (char *)m->at + (token * m->token + head * m->head) * SIZES[format];
}

/* c (rows, n vectors) += a (rows, depth) · b (depth, n vectors); `a_row` and `a_step` are the ways to a's next row and column */
INLINE void part_product(float *c, i64 c_row, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_row, i64 depth,
                         const int rows, const int vectors) {
    vec s[PART_ROWS][PART_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < vectors; n++) s[r][n] = *(vec *)(c + r * c_row + n * LANES);
    for (i64 k = 0; k < depth; k++, a += a_step, b += b_row) {
        vec w[PART_VECTORS];
        UNROLL for (int n = 0; n < vectors; n++) w[n] = *(const vec *)(b + n * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec x = each(a[r * a_row]);
            UNROLL for (int n = 0; n < vectors; n++) s[r][n] = fused(x, w[n], s[r][n]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < vectors; n++) *(vec *)(c + r * c_row + n * LANES) = s[r][n];
}
/* The same for any number of rows, and of columns that is a multiple of 16 */
NOINLINE void product(float *c, i64 c_row, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_row, i64 rows, i64 depth,
                      i64 columns) {
#define PART(n, m) part_product(c + row * c_row + column, c_row, a + row * a_row, a_row, a_step, b + column, b_row, depth, n, m)
#define ROWS_OF(m)                                                         \
    for (i64 row = 0; row < rows; row += PART_ROWS)                        \
        switch (rows - row) {                                              \
        case 1: PART(1, m); break;                                         \
        case 2: PART(2, m); break;                                         \
        case 3: PART(3, m); break;                                         \
        case 4: PART(4, m); break;                                         \
        case 5: PART(5, m); break;                                         \
        default: PART(PART_ROWS, m);                                       \
        }
    for (i64 column = 0; column < columns; column += PART_VECTORS * LANES)
        switch ((columns - column) / LANES) {
        case 1: ROWS_OF(1); break;
        case 2: ROWS_OF(2); break;
        case 3: ROWS_OF(3); break;
        default: ROWS_OF(PART_VECTORS);
        }
#undef ROWS_OF
#undef PART
}

/* Rows of a head to float32, (tokens, D) */
static void widen(float *to, const Rows *from, i64 token, i64 head, i64 tokens, const Attention *a) {
    for (i64 t = 0; t < tokens; t++) {
        const char *row = row_at(from, token + t, head, a->format);
        for (i64 d = 0; d < a->dim; d += LANES) *(vec *)(to + t * a->dim + d) = load(row + d * SIZES[a->format], (int)a->format);
    }
}
static void narrow(char *to, const float *from, i64 count, i64 format) {
    for (i64 d = 0; d < count; d += LANES) {
        const vec v = *(const vec *)(from + d);
        if (format == F32) *(vec *)(to + d * 4) = v;
        else *(halves *)(to + d * 2) = __builtin_convertvector(format == BF16 ? bits_of_bf16(v) : bits_of_f16(v), halves);
    }
}
static void transpose(float *to, const float *from, i64 tokens, i64 dim) { /* (tokens, D) -> (D, padded), zeros last */
    const i64 width = padded(tokens);
    memset(to, 0, dim * width * 4);
    for (i64 block = 0; block < tokens; block += 16) /* whose rows stay in the nearest cache */
        for (i64 d = 0; d < dim; d++)
            for (i64 t = block; t < block + 16 && t < tokens; t++) to[d * width + t] = from[t * dim + d];
}

INLINE i64 first_seen(const Attention *a, i64 token) { return a->window && token >= a->window ? token - a->window + 1 : 0; }
INLINE words seen(i64 at, i64 from, i64 to) { /* which of the LANES tokens from `at` on are in [from, to) */
    ints lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return (words)(lanes >= (int)(from - at < 0 ? 0 : from - at > LANES ? LANES : from - at)) &
           (words)(lanes < (int)(to - at < 0 ? 0 : to - at > LANES ? LANES : to - at));
}

/* A row of products with the keys from `start` to `stop` becomes e^(score - largest), and 0 where [from, to) is not;
   return the largest, and their sum. */
static float exponentials(const Attention *a, float *scores, i64 start, i64 stop, i64 from, i64 to, float *sum) {
    vec most = zero() - INFINITY, all = zero();
    for (i64 t = start; t < stop; t += LANES) {
        vec *s = (vec *)(scores + t);
        *s = choose(seen(t, from, to), capped(*s * a->scale, a->cap), zero() - INFINITY);
        most = choose((words)(*s > most), *s, most);
    }
    const float top = largest(most);
    for (i64 t = start; t < stop; t += LANES) {
        vec *s = (vec *)(scores + t);
        *s = choose(seen(t, from, to), exponential(*s - top), zero());
        all += *s;
    }
    *sum = total(all);
    return top;
}
/* A row of products and of its weights' gradients become weights and the products' gradients. */
static void gradients(const Attention *a, float *scores, float *dscores, i64 start, i64 stop, i64 from, i64 to, float log_sum,
                      float mean) {
    for (i64 t = start; t < stop; t += LANES) {
        vec *s = (vec *)(scores + t), *ds = (vec *)(dscores + t);
        const vec score = capped(*s * a->scale, a->cap);
        const words sees = seen(t, from, to);
        *s = choose(sees, exponential(score - log_sum), zero());
        vec d = *s * (*ds - mean) * a->scale;
        if (a->cap > 0) d *= 1.0f - (score / a->cap) * (score / a->cap);
        *ds = choose(sees, d, zero());
    }
}

static void forward(const Attention *a, Scratch *x, i64 first, i64 n, i64 head) {
    const i64 D = a->dim, width = padded(n), key_head = head / (a->heads / a->key_heads);
    widen(x->k, &a->k, first, key_head, n, a);
    widen(x->v, &a->v, first, key_head, n, a);
    transpose(x->k_columns, x->k, n, D);
    for (i64 row = 0; row < n; row += R) {
        const i64 rows = n - row < R ? n - row : R, from = first_seen(a, row), start = from / KEYS * KEYS;
        const i64 stop = padded(row + rows);
        widen(x->q, &a->q, first + row, head, rows, a);
        for (i64 r = 0; r < rows; r++) memset(x->scores + r * width + start, 0, (stop - start) * 4);
        memset(x->sum, 0, rows * D * 4);
        product(x->scores + start, width, x->q, D, 1, x->k_columns + start, width, rows, D, stop - start);
        float sums[R];
        for (i64 r = 0; r < rows; r++) {
            const float top = exponentials(a, x->scores + r * width, start, stop, first_seen(a, row + r), row + r + 1, sums + r);
            a->log_sums[head * a->tokens + first + row + r] = top + logf(sums[r]);
        }
        product(x->sum, D, x->scores + from, width, 1, x->v + from * D, D, rows, row + rows - from, D);
        for (i64 r = 0; r < rows; r++) {
            for (i64 d = 0; d < D; d += LANES) *(vec *)(x->sum + r * D + d) /= sums[r];
            narrow(row_at(&a->out, first + row + r, head, a->format), x->sum + r * D, D, a->format);
        }
    }
}

static void backward(const Attention *a, Scratch *x, i64 first, i64 n, i64 head) {
    const i64 D = a->dim, width = padded(n), key_head = head / (a->heads / a->key_heads);
    widen(x->k, &a->k, first, key_head, n, a);
    widen(x->v, &a->v, first, key_head, n, a);
    transpose(x->k_columns, x->k, n, D);
    transpose(x->v_columns, x->v, n, D);
    memset(x->dk, 0, n * D * 4);
    memset(x->dv, 0, n * D * 4);
    for (i64 row = 0; row < n; row += R) {
        const i64 rows = n - row < R ? n - row : R, from = first_seen(a, row), start = from / KEYS * KEYS;
        const i64 stop = padded(row + rows), depth = row + rows - from;
        float means[R]; /* of the weights' gradients, by the weights */
        widen(x->q, &a->out, first + row, head, rows, a);
        widen(x->grad, &a->grad, first + row, head, rows, a);
        for (i64 r = 0; r < rows; r++) {
            vec mean = zero();
            for (i64 d = r * D; d < r * D + D; d += LANES) mean = fused(*(vec *)(x->q + d), *(vec *)(x->grad + d), mean);
            means[r] = total(mean);
            memset(x->scores + r * width + start, 0, (stop - start) * 4);
            memset(x->dscores + r * width + start, 0, (stop - start) * 4);
        }
        widen(x->q, &a->q, first + row, head, rows, a);
        memset(x->sum, 0, rows * D * 4);
        product(x->scores + start, width, x->q, D, 1, x->k_columns + start, width, rows, D, stop - start);
        product(x->dscores + start, width, x->grad, D, 1, x->v_columns + start, width, rows, D, stop - start);
        for (i64 r = 0; r < rows; r++)
            gradients(a, x->scores + r * width, x->dscores + r * width, start, stop, first_seen(a, row + r), row + r + 1,
                      a->log_sums[head * a->tokens + first + row + r], means[r]);
        product(x->sum, D, x->dscores + from, width, 1, x->k + from * D, D, rows, depth, D);
        product(x->dk + from * D, D, x->dscores + from, 1, width, x->q, D, depth, rows, D);
        product(x->dv + from * D, D, x->scores + from, 1, width, x->grad, D, depth, rows, D);
        for (i64 r = 0; r < rows; r++) narrow(row_at(&a->dq, first + row + r, head, a->format), x->sum + r * D, D, a->format);
    }
    for (i64 t = 0; t < n; t++) {
        memcpy(a->dk + ((first + t) * a->heads + head) * D, x->dk + t * D, D * 4);
        memcpy(a->dv + ((first + t) * a->heads + head) * D, x->dv + t * D, D * 4);
    }
}

static i64 arrange(Scratch *x, char *at, const Attention *a, i64 backward) { /* return the bytes it takes */
    const i64 D = a->dim, n = a->longest, width = padded(n);
    char *const start = at;
#define TAKE(name, numbers) x->name = (float *)at, at += ((numbers) * 4 + 63) / 64 * 64
    TAKE(q, R * D), TAKE(sum, R * D), TAKE(scores, R * width), TAKE(k, n * D), TAKE(v, n * D), TAKE(k_columns, D * width);
    if (backward)
        TAKE(grad, R * D), TAKE(dscores, R * width), TAKE(dk, n * D), TAKE(dv, n * D), TAKE(v_columns, D * width);
#undef TAKE
    return at - start + 64;
}
static void run(void *data) {
    Work *work = data;
    const Attention *a = work->a;
    Scratch x = {0};
    const uintptr_t at = (uintptr_t)(work->scratch + omp_get_thread_num() * work->bytes);
    arrange(&x, (char *)((at + 63) / 64 * 64), a, work->backward);
    for (i64 unit; (unit = atomic_fetch_add(&work->next, 1)) < a->count * a->heads;) {
        const i64 sequence = a->order[unit / a->heads], first = a->starts[sequence];
        (work->backward ? backward : forward)(a, &x, first, a->starts[sequence + 1] - first, unit % a->heads);
    }
}
/* Return whether there is no memory; then nothing was written. */
int loradeck_varlen_attention(const Attention *a, int is_backward, int threads) {
    Scratch x;
    Work work = {.a = a, .backward = is_backward, .bytes = arrange(&x, 0, a, is_backward)};
    if (threads > a->count * a->heads) threads = (int)(a->count * a->heads);
    work.scratch = malloc(threads * work.bytes);
    if (!work.scratch) return 1;
    GOMP_parallel(run, &work, threads, 0);
    free(work.scratch);
    return 0;
}
