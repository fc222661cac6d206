/* A token for each row of logits: the likeliest, or one that is drawn; and its log-probability.

   weight[i] = exp((x[i] - max x) / temperature)             x: what the token is chosen from
   token     = the first whose running sum of weights is above u · sum of weights
   logprob   = y[token] - max y - log(sum exp(y - max y))    y: the model's own logits

   Tokens come in the order of their ids; where top_k, top_p or min_p rule some out, the likeliest first and equal ones
   by id. A row is one thread's, and its sums have one order: within groups of 64 in float32, else in double. */
#ifndef SAMPLING_H
#define SAMPLING_H
#include "numbers.h"

#define GROUP 64 /* tokens whose largest logit is looked up */
#define FEW 64   /* of the likeliest tokens, to begin with, where top_p or min_p may need more */

typedef struct {
    const float *logits, *adjusted; /* y and x, (vocabulary) */
    double temperature, top_p, min_p, u; /* 0 <= u < 1; a temperature of 0 takes the likeliest */
    i64 top_k;                           /* 0: all */
    i64 scored, tops;                    /* whether log-probabilities are asked for; of how many of the likeliest */
    i64 token;                           /* one that is given, to be scored; or -1, to be chosen */
    float largest, best;                 /* of y, NaN if one is; of x, if the token is chosen */
    float logprob, *top_logprobs;        /* (tops), best first */
    i64 *top_ids;
} Choice;

typedef struct {
    uint32_t key, id; /* a smaller key is a larger logit */
} Entry;
typedef struct {
    const float *x;
    i64 tokens, groups, count; /* of the list */
    float top, *most;          /* the largest logit; those of the groups */
    float *sums, *weights;     /* of the groups; of the list */
    Entry *list, *spare;       /* (tokens) */
} Row;

/* A group's logits; the last one's with -inf up to 64 in a copy */
INLINE const float *group_at(const Row *r, i64 group, float *copy) {
    const i64 left = r->tokens - group * GROUP;
    if (left >= GROUP) return r->x + group * GROUP;
    memcpy(copy, r->x + group * GROUP, left * sizeof(float));
    for (i64 i = left; i < GROUP; i++) copy[i] = -INFINITY;
    return copy;
}
/* Look at all logits once: the largest, NaN if one is, and that of each group */
static void scan(Row *r, const float *x) {
    float copy[GROUP];
    vec nan = zero();
    r->x = x, r->top = -INFINITY;
    for (i64 g = 0; g < r->groups; g++) {
        const float *logits = group_at(r, g, copy);
        vec most = zero() - INFINITY;
        for (i64 i = 0; i < GROUP; i += LANES) {
            const vec v = *(const vec *)(logits + i);
            nan = choose((words)(v != v), v, nan);
            most = choose((words)(v > most), v, most);
        }
        r->most[g] = largest(most);
        if (r->most[g] > r->top) r->top = r->most[g];
    }
    if (total(nan) != 0) r->top = NAN;
}
/* The first of the largest logits; -1 if one is NaN */
static i64 likeliest(const Row *r) {
    for (i64 g = 0; g < r->groups; g++)
        for (i64 id = g * GROUP; r->most[g] == r->top && id < r->tokens; id++)
            if (r->x[id] == r->top) return id;
    return -1;
}

INLINE vec weight(vec x, float top, float inverse) { /* inverse: 1 / temperature */
    const vec power = (x - top) * inverse;
    const words some = (words)(power >= -87.0f); /* below, it is 0 */
    return choose(some, bounded_exponential(choose(some, power, zero())), zero());
}
/* The sum of all tokens' weights, and the sums of the groups */
static double sum_all(Row *r, float inverse) {
    float copy[GROUP];
    double sum = 0;
    for (i64 g = 0; g < r->groups; g++) {
        const float *logits = group_at(r, g, copy);
        vec part = zero();
        UNROLL for (i64 i = 0; i < GROUP; i += LANES) part += weight(*(const vec *)(logits + i), r->top, inverse);
        sum += r->sums[g] = total(part);
    }
    return sum;
}
/* The first place where the running sum is above the target, or the last that has a weight; `before` comes before it */
static i64 place(const float *weights, i64 count, double target, double *before) {
    double sum = *before;
    i64 last = 0;
    for (i64 n = 0; n < count; n++) {
        if (weights[n] == 0) continue;
        *before = sum;
        sum += weights[last = n];
        if (sum > target) break;
    }
    return last;
}
static i64 draw_from_all(Row *r, float inverse, double u) {
    const double target = u * sum_all(r, inverse);
    double before = 0;
    float copy[GROUP];
    const i64 g = place(r->sums, r->groups, target, &before);
    const float *logits = group_at(r, g, copy);
    for (i64 i = 0; i < GROUP; i += LANES) *(vec *)(r->weights + i) = weight(*(const vec *)(logits + i), r->top, inverse);
    return g * GROUP + place(r->weights, GROUP, target, &before);
}

INLINE Entry entry(float logit, i64 id) {
    const float number = logit + 0.0f; /* -0 equals 0 */
    int32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (Entry){bits < 0 ? bits : ~bits & 0x7fffffff, (uint32_t)id};
}
/* Sort a list by key, 8 bits at a time; equal ones stay in their order */
static void sort(Entry *list, Entry *spare, i64 count) {
    for (int shift = 0; shift < 32; shift += 8) {
        i64 at[257] = {0};
        for (i64 n = 0; n < count; n++) at[(list[n].key >> shift & 255) + 1]++;
        for (int digit = 0; digit < 256; digit++) at[digit + 1] += at[digit];
        for (i64 n = 0; n < count; n++) spare[at[list[n].key >> shift & 255]++] = list[n];
        Entry *other = list;
        list = spare, spare = other;
    }
}
/* A bound that at least so many tokens reach, since the largest of as many groups do */
static float bound_of(Row *r, i64 count) {
    if (count > r->groups) return -INFINITY;
    for (i64 g = 0; g < r->groups; g++) r->list[g] = entry(r->most[g], g);
    sort(r->list, r->spare, r->groups);
    return r->most[r->list[count - 1].id];
}
/* List the tokens that reach a bound, best first */
static void rank(Row *r, float bound) {
    i64 count = 0;
    for (i64 g = 0; g < r->groups; g++) {
        if (r->most[g] < bound) continue;
        const i64 end = (g + 1) * GROUP < r->tokens ? (g + 1) * GROUP : r->tokens;
        for (i64 id = g * GROUP; id < end; id++) { /* without a branch: either may be as likely */
            r->list[count].id = (uint32_t)id;
            count += r->x[id] >= bound;
        }
    }
    for (i64 n = 0; n < count; n++) r->list[n] = entry(r->x[r->list[n].id], r->list[n].id);
    sort(r->list, r->spare, count);
    r->count = count;
}
static void weigh(Row *r, i64 count, float inverse) {
    for (i64 n = 0; n < count; n += LANES) {
        float x[LANES];
        for (i64 i = 0; i < LANES; i++) x[i] = n + i < count ? r->x[r->list[n + i].id] : -INFINITY;
        *(vec *)(r->weights + n) = weight(*(vec *)x, r->top, inverse);
    }
}
static i64 draw_from_likeliest(Row *r, const Choice *c) {
    const float inverse = 1 / c->temperature;
    double all = c->top_p < 1 && !c->top_k ? sum_all(r, inverse) : 0;
    /* Not kept if lighter: all that are so light have together less than the share that top_p cuts off. */
    const double least = fmax(c->min_p, (1 - c->top_p) * all / r->tokens);
    float bound = bound_of(r, c->top_k ? c->top_k : FEW);
    for (int sure = c->top_k > 0;; sure = 1) {
        rank(r, bound);
        const i64 count = c->top_k && c->top_k < r->count ? c->top_k : r->count;
        weigh(r, count, inverse);
        for (i64 n = 0; n < count && c->top_k; n++) all += r->weights[n];
        const double end = c->top_p < 1 ? c->top_p * all : INFINITY;
        double sum = 0, before = 0;
        i64 length = 0;
        do sum += r->weights[length++];
        while (length < count && sum < end && r->weights[length] >= c->min_p);
        if (length < count || sum >= end || sure) return r->list[place(r->weights, length, c->u * sum, &before)].id;
        bound = nextafterf(r->top + log(least * 0.999) * c->temperature, -INFINITY);
    }
}

static void choose_token(Choice *c, Row *r) {
    scan(r, c->logits);
    c->largest = r->top;
    if (!isfinite(c->largest)) return;
    const double sum = c->scored ? log(sum_all(r, 1)) : 0;
    if (c->tops) rank(r, bound_of(r, c->tops));
    for (i64 n = 0; n < c->tops; n++) {
        c->top_ids[n] = r->list[n].id;
        c->top_logprobs[n] = (double)r->x[r->list[n].id] - c->largest - sum;
    }
    if (c->token < 0) {
        if (c->adjusted != c->logits) scan(r, c->adjusted);
        c->best = r->top;
        if (c->temperature == 0 || !isfinite(r->top)) c->token = likeliest(r);
        else if (c->top_k || c->top_p < 1 || c->min_p > 0) c->token = draw_from_likeliest(r, c);
        else c->token = draw_from_all(r, 1 / c->temperature, c->u);
    }
    if (c->scored && c->token >= 0) c->logprob = (double)c->logits[c->token] - c->largest - sum;
}

#endif
