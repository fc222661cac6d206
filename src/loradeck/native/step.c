/* One step of a decoder for rows of tokens, each of its own sequence, at its own position, through its own adapters.

   What is computed is defined in table.py and reference.py. A layer is so many phases: rows are normed (and met by the
   adapters' A), matrices are multiplied tile by tile (and met by B at once), heads attend, rows are sorted by expert. */
#include "numbers.h"
#include "product.h"
#include "adapters.h"
#include "attention.h"
#include "experts.h"
#include "norms.h"
#include "sampling.h"
#include "team.h"

#define CHUNK 64 /* rows whose sums are kept at a time */
#define PHASES 11 /* of a layer, at most */
enum { SILU, GELU, GELU_TANH };

typedef struct {
    Matrix matrix[SLOTS];
    const float *attention_in, *attention_out, *mlp_in, *mlp_out; /* norms: (hidden), or null */
    const float *query_norm, *key_norm;                           /* (dim), or (heads, dim) if norms_all; or null */
    const float *cos, *sin;                                       /* (positions, turned / 2), or null */
    i64 turned, window, norms_all;
    Experts experts; /* in place of the matrices of the MLP; their count is 0 where there are none */
} Layer;
typedef struct {
    i64 layers, hidden, heads, key_heads, dim, inter, vocabulary; /* padded: to 32, and the vocabulary to 64 */
    i64 true_hidden, true_dim;                                    /* not padded */
    i64 activation, cache_format, embedding_format, rounds; /* rounds: what quantised matrices are multiplied with */
    const Layer *layer;
    const char *embedding; /* (vocabulary, true_hidden), or null: the rows of `lookup` */
    const float *norm;
    Matrix lookup, head;
    double eps;
    float embedding_scale, scale, softcap, residual_scale, logit_scale, logit_cap; /* a cap of 0 is none */
} Model;
typedef struct {
    i64 rows, wanted;
    const i64 *tokens, *positions, *sequences, *routes; /* (rows) */
    const i64 *want;                                    /* (wanted) rows that need logits */
    char *const *const *pages;                          /* of each sequence */
    const Route *route;
    i64 ranks;    /* the largest sum of a route's ranks at one matrix */
    float *logits; /* (wanted, vocabulary) */
} Batch;

typedef struct { /* y = x W^T + bias */
    Matrix w;
    const char *x; /* (rows, inputs) */
    char *y;       /* (rows, outputs) */
    i64 rows, inputs, outputs, format; /* of x and y */
} Product;

typedef struct { /* W^T of some tiles, as plain numbers */
    Matrix w;
    char *y;         /* (inputs, 16 count) */
    const i64 *tile; /* (count) */
    i64 count, format;
} Plain;
typedef struct { /* quantised blocks of a file, to be laid out in tiles */
    const uint8_t *blocks; /* (rows of the file, bytes of a row) */
    const i64 *order;      /* (outputs) the file's row of each, or null: in order */
    char *tiles;
    i64 row_bytes, outputs, groups, format, count; /* count: of tiles */
} Layout;

struct Step {
    void (*way)(Step *, int); /* each thread's way through it */
    const Model *m;
    const Batch *b;
    i64 adapts, segments, tiles; /* tiles: whose sums a thread keeps at a time */
    i64 chosen_experts;          /* of a row, at most */
    float *hidden, *branch, *raw, *h; /* h: (SLOTS, rows, ranks) */
    Panel x, query, attended, gathered, active, last;
    Segment *segment;
    i64 *chosen, *order, *groups; /* (rows, chosen), pairs of a row and an expert by expert; of each layer */
    float *weight;                /* (rows, chosen) */
    Group *group;
    char *scratch; /* of each thread */
    i64 scratch_bytes;
    _Atomic i64 *counters;
    int members;
    const Product *product;
    const Layout *layout;
    Choice *choices;
    i64 count, vocabulary; /* of the choices */
};
static _Atomic i64 *counters_of(Step *step) { return step->counters; }

/* hidden = the token's row of the embedding */
static void embed(Step *s, i64 row) {
    const Model *m = s->m;
    const i64 token = s->b->tokens[row], H = m->true_hidden;
    float *hidden = s->hidden + row * m->hidden;
    num room[512] __attribute__((aligned(64)));
    const char *block = 0;
    int format = (int)m->embedding_format;
    for (i64 i = 0; i < H; i++) {
        if (!m->embedding && i % 32 == 0) block = block_of(&m->lookup, token / 16, i / 32, room, &format);
        const char *from = m->embedding ? m->embedding + (token * H + i) * SIZES[format]
                                        : number_at((char *)block, i % 32, token % 16, format);
        hidden[i] = m->embedding_scale * load_one(from, format);
    }
    for (i64 i = H; i < m->hidden; i++) hidden[i] = 0;
}

/* A head's query, key or value of one row, once its matrix is multiplied: normed, turned, and put where attention reads */
static void finish_head(Step *s, const Layer *l, i64 layer, i64 kind, i64 head, i64 row, float *x, int normed) {
    const Model *m = s->m;
    const i64 D = m->dim, group = m->heads / m->key_heads, position = s->b->positions[row];
    const float *norm = kind == Q ? l->query_norm : kind == K ? l->key_norm : 0;
    if (norm && !normed) {
        const float factor = inverse_rms(sum_of_squares(x, D), m->true_dim, m->eps);
        for (i64 d = 0; d < D; d++) x[d] = x[d] * factor * norm[d];
    }
    if (kind != V && l->cos) {
        const i64 half = l->turned / 2;
        const float *cos = l->cos + position * half, *sin = l->sin + position * half;
        for (i64 d = 0; d < half; d++) {
            const float a = x[d], b = x[d + half];
            x[d] = a * cos[d] - b * sin[d];
            x[d + half] = b * cos[d] + a * sin[d];
        }
    }
    if (kind == Q) {
        num *to = panel_at(&s->query, row * group + head % group, head / group * (D / 32));
        for (i64 d = 0; d < D; d += LANES) put(to + d / 32 * s->query.rows * 32 + d % 32, *(vec *)(x + d) * m->scale);
        return;
    }
    const i64 format = m->cache_format, block = BLOCK[format], half = head_bytes(D, format), token = position % PAGE;
    char *to = s->b->pages[s->b->sequences[row]][position / PAGE] + (layer * m->key_heads + head) * 2 * half;
    if (kind == K)
        for (i64 d = 0; d < D; d++)
            store_number(to + (token / 16 * (D / 32) + d / 32) * block, d % 32, token % 16, (int)format, x[d]);
    else
        for (i64 d = 0; d < D; d++) store_number(to + half + d / 16 * block, token, d % 16, (int)format, x[d]);
}
/* Queries and keys that are normed over all heads together */
static void norm_all_heads(Step *s, const Layer *l, i64 layer, i64 row) {
    const Model *m = s->m;
    for (i64 kind = Q, first = 0; kind <= K; kind++) {
        const i64 heads = kind == Q ? m->heads : m->key_heads;
        const float *norm = kind == Q ? l->query_norm : l->key_norm;
        float *x = s->raw + (row * (m->heads + m->key_heads) + first) * m->dim;
        const float factor = inverse_rms(sum_of_squares(x, heads * m->dim), heads * m->true_dim, m->eps);
        for (i64 i = 0; norm && i < heads * m->dim; i++) x[i] = x[i] * factor * norm[i];
        for (i64 n = 0; n < heads; n++) finish_head(s, l, layer, kind, n, row, x + n * m->dim, 1);
        first += heads;
    }
}

/* The rows of a route that follow each other from `row` on, `end` at most */
INLINE i64 same_route(const Step *s, i64 row, i64 end) {
    i64 next = row + 1;
    while (next < end && s->b->routes[next] == s->b->routes[row]) next++;
    return next - row;
}
INLINE float *ranks_of(const Step *s, i64 slot, i64 row) { return s->h + (slot * s->b->rows + row) * s->b->ranks; }
static void shrinks(Step *s, i64 layer, i64 first, i64 last, i64 inputs, const Panel *x, i64 row, i64 rows) {
    if (!s->adapts) return;
    for (i64 t = row, n; t < row + rows; t += n) {
        n = same_route(s, t, row + rows);
        for (i64 slot = first; slot <= last; slot++)
            shrink(ranks_of(s, slot, t), s->b->ranks, s->b->route + s->b->routes[t], layer * SLOTS + slot, inputs, x, t, n);
    }
}
static void expands(Step *s, float *sum, i64 layer, i64 slot, i64 tile, i64 row, i64 rows) {
    if (!s->adapts) return;
    for (i64 t = row, n; t < row + rows; t += n) {
        n = same_route(s, t, row + rows);
        expand(sum + (t - row) * 16, s->b->route + s->b->routes[t], layer * SLOTS + slot, tile, ranks_of(s, slot, t), s->b->ranks, n);
    }
}

static void queries_keys_values(Step *s, i64 layer, i64 unit, float *sum) {
    const Model *m = s->m;
    const Layer *l = m->layer + layer;
    const i64 D = m->dim, tiles = D / 16, kind = unit < m->heads ? Q : unit < m->heads + m->key_heads ? K : V;
    const i64 head = unit - (kind == Q ? 0 : kind == K ? m->heads : m->heads + m->key_heads);
    float x[D];
    for (i64 row = 0, rows; row < s->b->rows; row += rows) {
        rows = s->b->rows - row < CHUNK ? s->b->rows - row : CHUNK;
        tiles_of(sum, rows * 16, l->matrix + kind, head * tiles, (int)tiles, &s->x, row, rows);
        for (i64 t = 0; t < tiles; t++) expands(s, sum + t * rows * 16, layer, kind, head * tiles + t, row, rows);
        for (i64 r = 0; r < rows; r++) {
            float *to = l->norms_all && kind != V ? s->raw + ((row + r) * (m->heads + m->key_heads) + unit) * D : x;
            for (i64 t = 0; t < tiles; t++) memcpy(to + t * 16, sum + (t * rows + r) * 16, 64);
            if (to == x) finish_head(s, l, layer, kind, head, row + r, x, 0);
        }
    }
}
/* branch = x W^T of two tiles */
static void branch(Step *s, i64 layer, i64 slot, const Panel *x, i64 unit, float *sum) {
    const Matrix *w = s->m->layer[layer].matrix + slot;
    for (i64 row = 0, rows; row < s->b->rows; row += rows) {
        rows = s->b->rows - row < CHUNK ? s->b->rows - row : CHUNK;
        tiles_of(sum, rows * 16, w, unit * 2, 2, x, row, rows);
        for (i64 t = 0; t < 2; t++) {
            expands(s, sum + t * rows * 16, layer, slot, unit * 2 + t, row, rows);
            for (i64 r = 0; r < rows; r++)
                memcpy(s->branch + (row + r) * s->m->hidden + (unit * 2 + t) * 16, sum + (t * rows + r) * 16, 64);
        }
    }
}
INLINE vec activated(vec x, i64 activation) {
    if (activation == SILU) return x / (exponential(-x) + 1.0f);
    if (activation == GELU_TANH) return x * 0.5f * (tangent((x + x * x * x * 0.044715f) * 0.7978845608f) + 1.0f);
    for (int i = 0; i < LANES; i++) x[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.7071067812f));
    return x;
}
static void gate_and_up(Step *s, i64 layer, const Group *g, const Panel *x, i64 unit, float *sum) {
    for (i64 row = g->row, end = g->row + g->rows, rows; row < end; row += rows) {
        rows = end - row < CHUNK ? end - row : CHUNK;
        for (i64 slot = GATE; slot <= UP; slot++) {
            float *part = sum + (slot - GATE) * 2 * rows * 16;
            tiles_of(part, rows * 16, g->matrices + slot - GATE, unit * 2, 2, x, row, rows);
            if (!s->m->layer[layer].experts.count)
                for (i64 t = 0; t < 2; t++) expands(s, part + t * rows * 16, layer, slot, unit * 2 + t, row, rows);
        }
        for (i64 r = 0; r < rows; r++) {
            for (i64 c = 0; c < 32; c += LANES) {
                const float *gate = sum + (c / 16 * rows + r) * 16 + c % 16, *up = gate + 2 * rows * 16;
                put(panel_at(&s->active, row + r, unit) + c, activated(*(vec *)gate, s->m->activation) * *(vec *)up);
            }
            round_group(&s->active, row + r, unit);
        }
    }
}
static void choose_experts(Step *s, const Experts *e, i64 row, i64 rows, float *sum) {
    const i64 tiles = e->router.tiles;
    float p[tiles * 16];
    tiles_of(sum, rows * 16, &e->router, 0, (int)tiles, &s->x, row, rows);
    for (i64 r = 0; r < rows; r++) {
        for (i64 t = 0; t < tiles; t++) memcpy(p + t * 16, sum + (t * rows + r) * 16, 64);
        choose_for_row(e, p, s->chosen + (row + r) * e->chosen, s->weight + (row + r) * e->chosen);
    }
}
/* gathered = the rows of x, by expert; one group of 32 inputs */
static void gather(Step *s, const Experts *e, i64 unit) {
    for (i64 i = 0; i < s->b->rows * e->chosen; i++) {
        memcpy(panel_at(&s->gathered, i, unit), panel_at(&s->x, s->order[i] / e->chosen, unit), 32 * sizeof(num));
        round_group(&s->gathered, i, unit);
    }
}
/* branch = the weighted sum of a row's experts, in the order of their numbers, of two tiles */
static void mix(Step *s, const Experts *e, i64 groups, i64 unit, float *sum) {
    const i64 H = s->m->hidden;
    for (i64 row = 0; row < s->b->rows; row++) memset(s->branch + row * H + unit * 32, 0, 128);
    for (const Group *g = s->group; g < s->group + groups; g++)
        for (i64 row = g->row, end = g->row + g->rows, rows; row < end; row += rows) {
            rows = end - row < CHUNK ? end - row : CHUNK;
            tiles_of(sum, rows * 16, g->matrices + DOWN - GATE, unit * 2, 2, &s->active, row, rows);
            for (i64 r = 0; r < rows; r++) {
                const i64 pair = s->order[row + r];
                for (i64 c = 0; c < 32; c += LANES)
                    *(vec *)(s->branch + pair / e->chosen * H + unit * 32 + c) +=
                        *(vec *)(sum + (c / 16 * rows + r) * 16 + c % 16) * s->weight[pair];
            }
        }
}
static void head(Step *s, i64 unit, float *sum) {
    const Model *m = s->m;
    for (i64 row = 0, rows; row < s->b->wanted; row += rows) {
        rows = s->b->wanted - row < CHUNK ? s->b->wanted - row : CHUNK;
        tiles_of(sum, rows * 16, &m->head, unit * 4, 4, &s->last, row, rows);
        for (i64 t = 0; t < 4; t++)
            for (i64 r = 0; r < rows; r++)
                for (i64 c = 0; c < 16; c += LANES)
                    *(vec *)(s->b->logits + (row + r) * m->vocabulary + unit * 64 + t * 16 + c) =
                        capped(*(vec *)(sum + (t * rows + r) * 16 + c) * m->logit_scale, m->logit_cap);
    }
}

#define UNITS(u, n) for (i64 u; (u = take(s, phase, thread, s->members, n)) < (n); finish(s, phase, s->members))
#define END(n) wait_for(s, phase++, s->members, n)
#define ROWS_OF_UNIT const i64 row = u * per, rows = T - row < per ? T - row : per
static void model(Step *s, int thread) {
    const Model *m = s->m;
    const i64 T = s->b->rows, per = T > 8 ? 4 : 1, blocks = (T + per - 1) / per, H = m->hidden, width = m->heads * m->dim;
    const i64 inters = m->inter / 32;
    i64 phase = 0;
    float *sum = (float *)(s->scratch + thread * s->scratch_bytes);
    char *scores = (char *)(sum + s->tiles * CHUNK * 16);
    const float *out_norm = 0;
    UNITS(u, T) embed(s, u);
    END(T);
    for (i64 n = 0; n < m->layers; n++) {
        const Layer *l = m->layer + n;
        const Experts *e = &l->experts;
        UNITS(u, blocks) {
            ROWS_OF_UNIT;
            for (i64 t = row; t < row + rows; t++)
                add_and_norm(s->hidden + t * H, n ? s->branch + t * H : 0, out_norm, m->residual_scale, l->attention_in,
                             &s->x, t, m->true_hidden, H, m->eps);
            shrinks(s, n, Q, V, H, &s->x, row, rows);
        }
        END(blocks);
        UNITS(u, m->heads + 2 * m->key_heads) queries_keys_values(s, n, u, sum);
        END(m->heads + 2 * m->key_heads);
        if (l->norms_all) {
            UNITS(u, T) norm_all_heads(s, l, n, u);
            END(T);
        }
        UNITS(u, s->segments * m->key_heads) {
            const i64 key_head = u % m->key_heads, group = m->heads / m->key_heads;
            const Attention a = {group, m->dim, m->cache_format,
                                 (n * m->key_heads + key_head) * 2 * head_bytes(m->dim, m->cache_format), l->window, m->softcap};
            const Panel query = {s->query.numbers + key_head * (m->dim / 32) * s->query.rows * 32, s->query.rows};
            attend(&a, s->segment + u / m->key_heads, &query, &s->attended, key_head * group, scores);
        }
        END(s->segments * m->key_heads);
        if (s->adapts) {
            UNITS(u, blocks) { ROWS_OF_UNIT; shrinks(s, n, O, O, width, &s->attended, row, rows); }
            END(blocks);
        }
        UNITS(u, H / 32) branch(s, n, O, &s->attended, u, sum);
        END(H / 32);
        UNITS(u, blocks) {
            ROWS_OF_UNIT;
            for (i64 t = row; t < row + rows; t++)
                add_and_norm(s->hidden + t * H, s->branch + t * H, l->attention_out, m->residual_scale, l->mlp_in, &s->x, t,
                             m->true_hidden, H, m->eps);
            if (e->count) choose_experts(s, e, row, rows, sum);
            else shrinks(s, n, GATE, UP, H, &s->x, row, rows);
        }
        END(blocks);
        if (e->count) {
            UNITS(u, 1) s->groups[n] = group_by_expert(e, s->chosen, T * e->chosen, s->order, s->group);
            END(1);
            UNITS(u, H / 32) gather(s, e, u);
            END(H / 32);
            UNITS(u, s->groups[n] * inters) gate_and_up(s, n, s->group + u / inters, &s->gathered, u % inters, sum);
            END(s->groups[n] * inters);
            UNITS(u, H / 32) mix(s, e, s->groups[n], u, sum);
            END(H / 32);
        } else {
            UNITS(u, inters) gate_and_up(s, n, &(Group){l->matrix + GATE, 0, T}, &s->x, u, sum);
            END(inters);
            if (s->adapts) {
                UNITS(u, blocks) { ROWS_OF_UNIT; shrinks(s, n, DOWN, DOWN, m->inter, &s->active, row, rows); }
                END(blocks);
            }
            UNITS(u, H / 32) branch(s, n, DOWN, &s->active, u, sum);
            END(H / 32);
        }
        out_norm = l->mlp_out;
    }
    UNITS(u, s->b->wanted) {
        const i64 t = s->b->want[u];
        add_and_norm(s->hidden + t * H, m->layers ? s->branch + t * H : 0, out_norm, m->residual_scale, m->norm, &s->last, u,
                     m->true_hidden, H, m->eps);
    }
    END(s->b->wanted);
    UNITS(u, m->vocabulary / 64) head(s, u, sum);
    END(m->vocabulary / 64);
}

INLINE void store(char *to, vec v, i64 format) {
    if (format == F32) *(vec *)to = v;
    else *(halves *)to = __builtin_convertvector(format == BF16 ? bits_of_bf16(v) : bits_of_f16(v), halves);
}
static void multiply(Step *s, int thread) {
    const Product *p = s->product;
    const i64 size = SIZES[p->format], tiles = p->w.tiles / 2;
    float *sum = (float *)(s->scratch + thread * s->scratch_bytes);
    i64 phase = 0;
    UNITS(t, p->rows)
        for (i64 i = 0; i < p->w.groups * 32; i += LANES) {
            char part[LANES * 4] = {0};
            const i64 left = p->inputs - i < LANES ? p->inputs - i : LANES;
            if (left > 0) memcpy(part, p->x + (t * p->inputs + i) * size, left * size);
            put(panel_at(&s->x, t, i / 32) + i % 32, load(part, (int)p->format));
        }
    END(p->rows);
    UNITS(u, tiles)
        for (i64 row = 0, rows; row < p->rows; row += rows) {
            rows = p->rows - row < CHUNK ? p->rows - row : CHUNK;
            tiles_of(sum, rows * 16, &p->w, u * 2, 2, &s->x, row, rows);
            for (i64 t = 0; t < 2; t++)
                for (i64 r = 0; r < rows; r++)
                    for (i64 c = 0; c < 16; c += LANES) {
                        char part[LANES * 4];
                        const i64 output = (u * 2 + t) * 16 + c, left = p->outputs - output < LANES ? p->outputs - output : LANES;
                        store(part, *(vec *)(sum + (t * rows + r) * 16 + c), p->format);
                        if (left > 0) memcpy(p->y + ((row + r) * p->outputs + output) * size, part, left * size);
                    }
        }
    END(tiles);
}

static void lay_out_tiles(Step *s, int thread) {
    const Layout *l = s->layout;
    const i64 per = groups_of_file_block(l->format), supers = l->groups / per, bytes = super_bytes(l->format);
    FileBlock block;
    i64 phase = 0;
    UNITS(u, l->count) {
        char *tile = l->tiles + u * supers * bytes;
        memset(tile, 0, supers * bytes);
        for (int c = 0; c < 16 && u * 16 + c < l->outputs; c++) {
            const uint8_t *from = l->blocks + (l->order ? l->order[u * 16 + c] : u * 16 + c) * l->row_bytes;
            for (i64 i = 0; i < supers; i++, from += FORMAT[l->format].file_bytes) {
                take_apart(&block, from, l->format);
                put_block(tile + i * bytes, &block, c, l->format);
            }
        }
    }
    END(l->count);
}

INLINE void *cut(char *from, i64 *at, i64 bytes) { /* with two lines to spare, for what is read as whole vectors */
    char *start = from ? from + *at : 0;
    *at += (bytes + 128 + 63) / 64 * 64;
    return start;
}
static i64 lay_out_row(Row *r, i64 vocabulary, char *from) { /* return the bytes that a row needs */
    i64 at = 0;
    r->tokens = vocabulary;
    r->groups = (vocabulary + GROUP - 1) / GROUP;
    r->most = cut(from, &at, r->groups * 4);
    r->sums = cut(from, &at, r->groups * 4);
    r->weights = cut(from, &at, r->groups * GROUP * 4);
    r->list = cut(from, &at, vocabulary * sizeof(Entry));
    r->spare = cut(from, &at, vocabulary * sizeof(Entry));
    return at;
}
static void choose_tokens(Step *s, int thread) {
    Row row;
    i64 phase = 0;
    lay_out_row(&row, s->vocabulary, s->scratch + thread * s->scratch_bytes);
    UNITS(u, s->count) choose_token(s->choices + u, &row);
    END(s->count);
}

/* ---- the calls ---- */
static void work(Step *step, int thread) { step->way(step, thread); }
static struct { char *bytes; i64 size; } room; /* kept from step to step; the team's lock guards it */

INLINE Panel panel(char *from, i64 *at, i64 rows, i64 inputs, i64 rounds) {
    num *numbers = cut(from, at, rows * inputs * sizeof(num));
    return (Panel){numbers, rows, rounds ? cut(from, at, rows * inputs / 32 * sizeof(Rounded)) : 0};
}
static i64 lay_out(Step *s, char *from) { /* return the bytes that a step needs, from an address that may be null */
    const Model *m = s->m;
    const i64 T = s->b->rows, W = s->b->wanted, group = m->heads / m->key_heads, width = m->heads * m->dim;
    i64 at = 0;
    const i64 pairs = T * s->chosen_experts;
    s->counters = cut(from, &at, (m->layers * PHASES + 3) * (s->members + 1) * LINE * sizeof(i64));
    s->segment = cut(from, &at, T * sizeof(Segment));
    s->hidden = cut(from, &at, T * m->hidden * 4);
    s->branch = cut(from, &at, T * m->hidden * 4);
    s->raw = cut(from, &at, T * (m->heads + m->key_heads) * m->dim * 4);
    s->h = cut(from, &at, SLOTS * T * s->b->ranks * 4);
    s->x = panel(from, &at, T, m->hidden, m->rounds);
    s->query = (Panel){cut(from, &at, T * width * sizeof(num)), T * group};
    s->attended = panel(from, &at, T, width, m->rounds);
    s->gathered = panel(from, &at, pairs, m->hidden, m->rounds);
    const i64 most = pairs > T ? pairs : T;
    s->active = panel(from, &at, most, m->inter, m->rounds);
    s->chosen = cut(from, &at, pairs * sizeof(i64));
    s->order = cut(from, &at, pairs * sizeof(i64));
    s->weight = cut(from, &at, pairs * 4);
    s->group = cut(from, &at, pairs * sizeof(Group));
    s->groups = cut(from, &at, m->layers * sizeof(i64));
    s->last = panel(from, &at, W, m->hidden, m->rounds);
    s->scratch = cut(from, &at, s->members * s->scratch_bytes);
    return at;
}
/* Memory for a step of `need` bytes, or null */
static char *room_of(i64 need) {
    if (need > room.size) {
        free(room.bytes);
        room.size = (need + need / 4 + 63) / 64 * 64;
        room.bytes = aligned_alloc(64, room.size);
        if (!room.bytes) room.size = 0;
    }
    return room.bytes;
}
/* Compute a step. Return 0; 1 if there is no memory for it: then nothing is written. */
int loradeck_step(const Model *m, const Batch *b, int threads) {
    Step s = {.way = model, .m = m, .b = b, .tiles = m->dim / 16 > 4 ? m->dim / 16 : 4};
    const i64 phases = m->layers * PHASES + 3;
    i64 longest = 0;
    for (const Layer *l = m->layer; l < m->layer + m->layers; l++) {
        if (l->experts.chosen > s.chosen_experts) s.chosen_experts = l->experts.chosen;
        if (l->experts.router.tiles > s.tiles) s.tiles = l->experts.router.tiles;
    }
    for (i64 t = 0; t < b->rows; t++) {
        if (b->positions[t] + 1 > longest) longest = b->positions[t] + 1;
        if (b->route[b->routes[t]].count) s.adapts = 1;
    }
    s.scratch_bytes = (s.tiles * CHUNK * 64 + scratch_bytes(longest, m->heads / m->key_heads, m->dim) + 63) / 64 * 64;
    pthread_mutex_lock(&team.busy);
    s.members = grow(threads);
    char *memory = room_of(lay_out(&s, 0));
    if (memory) {
        lay_out(&s, memory);
        memset(s.counters, 0, phases * (s.members + 1) * LINE * sizeof(i64));
        for (i64 t = 0, n; t < b->rows; t += n) {
            for (n = 1; n < SEGMENT && t + n < b->rows; n++)
                if (b->sequences[t + n] != b->sequences[t] || b->positions[t + n] != b->positions[t] + n) break;
            s.segment[s.segments++] = (Segment){t, n, b->positions[t], b->pages[b->sequences[t]]};
        }
        together(&s, s.members);
    }
    pthread_mutex_unlock(&team.busy);
    return !memory;
}
/* Compute a product. Return 0; 1 if there is no memory for it. */
int loradeck_product(const Product *p, int threads) {
    const i64 inputs = p->w.groups * 32;
    Step s = {.way = multiply, .product = p, .scratch_bytes = 2 * CHUNK * 64};
    pthread_mutex_lock(&team.busy);
    s.members = grow(threads);
    const i64 counters = 2 * (s.members + 1) * LINE * sizeof(i64), panel = (p->rows * inputs * sizeof(num) + 63) / 64 * 64;
    char *memory = room_of(counters + panel + s.members * s.scratch_bytes + 256);
    if (memory) {
        s.counters = (_Atomic i64 *)memory;
        memset(memory, 0, counters);
        s.x = (Panel){(num *)(memory + counters), p->rows};
        s.scratch = memory + counters + panel;
        together(&s, s.members);
    }
    pthread_mutex_unlock(&team.busy);
    return !memory;
}
/* Choose or score tokens. Return 0; 1 if there is no memory for it: then nothing is written. */
int loradeck_sample(Choice *choices, i64 count, i64 vocabulary, int threads) {
    Row row;
    Step s = {.way = choose_tokens, .choices = choices, .count = count, .vocabulary = vocabulary};
    s.scratch_bytes = lay_out_row(&row, vocabulary, 0);
    pthread_mutex_lock(&team.busy);
    s.members = grow(count < threads ? (int)count : threads);
    const i64 counters = (s.members + 1) * LINE * sizeof(i64);
    char *memory = room_of(counters + s.members * s.scratch_bytes);
    if (memory) {
        s.counters = (_Atomic i64 *)memory;
        memset(memory, 0, counters);
        s.scratch = memory + counters;
        together(&s, s.members);
    }
    pthread_mutex_unlock(&team.busy);
    return !memory;
}
static int run_in_parts(Step s, int threads) { /* a call of one phase that needs no memory but its counters */
    pthread_mutex_lock(&team.busy);
    s.members = grow(threads);
    const i64 counters = (s.members + 1) * LINE * sizeof(i64);
    char *memory = room_of(counters);
    if (memory) {
        s.counters = (_Atomic i64 *)memory;
        memset(memory, 0, counters);
        together(&s, s.members);
    }
    pthread_mutex_unlock(&team.busy);
    return !memory;
}
/* Torch's products come before and after this call, and its threads look for work for a while after each. So they do this
   work too: the team would wait for their cores. Where no OpenMP runtime is loaded, the caller does it alone. */
extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static void decode_groups(const Plain *p, i64 from, i64 to) { /* each of 32 rows of a group from its start to its end */
    const i64 size = SIZES[p->format], width = p->count * 16 * size;
    float room[512] __attribute__((aligned(64)));
    fenv_t own;
    fegetenv(&own);
    fesetenv(FE_DFL_ENV);
    for (i64 g = from; g < to; g++)
        for (i64 n = 0; n < p->count; n++) {
            decode(room, p->w.blocks + p->tile[n] * tile_bytes_of(&p->w), g, p->w.format, F32);
            for (i64 i = 0; i < 32; i++)
                for (i64 c = 0; c < 16; c += LANES)
                    store(p->y + (g * 32 + i) * width + (n * 16 + c) * size, *(vec *)(room + i * 16 + c), p->format);
        }
    fesetenv(&own);
}
static void decode_part(void *plain) {
    const Plain *p = plain;
    const i64 thread = omp_get_thread_num(), threads = omp_get_num_threads();
    decode_groups(p, p->w.groups * thread / threads, p->w.groups * (thread + 1) / threads);
}
/* Decode weights to plain numbers. */
void loradeck_plain(const Plain *p, int threads) {
    if (GOMP_parallel && threads > 1) GOMP_parallel(decode_part, (void *)p, threads, 0);
    else decode_groups(p, 0, p->w.groups);
}
/* y (count) = single weights, each by its place in W row by row */
void loradeck_values(const Matrix *w, const i64 *place, i64 count, float *y) {
    const i64 inputs = w->groups * 32;
    float room[512] __attribute__((aligned(64)));
    for (i64 n = 0; n < count; n++) {
        const i64 output = place[n] / inputs, input = place[n] % inputs;
        decode(room, w->blocks + output / 16 * tile_bytes_of(w), input / 32, w->format, F32);
        y[n] = room[input % 32 * 16 + output % 16];
    }
}
/* Lay a file's blocks out in tiles. Return 0; 1 if there is no memory for it. */
int loradeck_lay_out(const Layout *l, int threads) { return run_in_parts((Step){.way = lay_out_tiles, .layout = l}, threads); }
i64 loradeck_tile_bytes(i64 format, i64 groups) { return quantised_tile_bytes(format, groups); }
i64 loradeck_page_bytes(const Model *m) { return m->layers * m->key_heads * 2 * head_bytes(m->dim, m->cache_format); }
