/* Steps of small random models outside Python, for sanitizers and for other machines: make sanitize.

   Sequences through adapters of their own, in several chunks and with several threads, must have the bits that each has
   alone, and so must tokens; prints some logits of each format, and the tokens. Every array ends where its last number does. */
#include <stdio.h>
#include "step.c"

enum { SEQUENCES = 6, LENGTH = 70, HIDDEN = 64, HEADS = 4, KEY_HEADS = 2, DIM = 32, INTER = 96, VOCABULARY = 128, LAYERS = 3, EXPERTS = 5 };

static uint64_t state;
static double uniform(void) { /* between -1 and 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int32_t)(state >> 32) / 2147483648.0;
}
static void *numbers(i64 count, i64 format, double size) {
    char *all = malloc(count * SIZES[format]);
    for (i64 i = 0; i < count; i++) {
        if (format == F32) ((float *)all)[i] = uniform() * size;
        else ((uint16_t *)all)[i] = half_bits(uniform() * size, (int)format);
    }
    return all;
}
static float *norm(i64 count) {
    float *all = numbers(count, F32, 0.3);
    for (i64 i = 0; i < count; i++) all[i] += 1;
    return all;
}
static char *quantised(const Matrix *m) { /* of a format without superblocks */
    const i64 group = quantised_bytes(m->format), count = m->tiles * m->groups;
    char *all = malloc(count * group);
    for (i64 g = 0; g < count; g++) {
        char *from = all + g * group, *scales = from + plane_bytes(FORMAT[m->format].low) + plane_bytes(FORMAT[m->format].high);
        for (char *code = from; code < scales; code++) *code = (char)(int)(uniform() * 127);
        for (uint16_t *half = (uint16_t *)scales; (char *)half < from + group; half++) *half = half_bits(uniform() * 0.02, F16);
    }
    return all;
}
static Matrix matrix(i64 outputs, i64 inputs, i64 format, int bias) {
    Matrix m = {0, outputs / 16, inputs / 32, format, bias ? numbers(outputs, F32, 0.2) : 0};
    m.blocks = format < QUANTISED ? numbers(outputs * inputs, format, 0.2) : quantised(&m);
    return m;
}
static const i64 OUTPUTS[] = {HEADS * DIM, KEY_HEADS * DIM, KEY_HEADS * DIM, HIDDEN, INTER, INTER, HIDDEN};
static const i64 INPUTS[] = {HIDDEN, HIDDEN, HIDDEN, HEADS * DIM, HIDDEN, HIDDEN, INTER};

static Experts experts(i64 format) { /* with numbers of their own, two for a row */
    Matrix *all = malloc(EXPERTS * 3 * sizeof(Matrix));
    for (i64 i = 0; i < EXPERTS * 3; i++) all[i] = matrix(OUTPUTS[GATE + i % 3], INPUTS[GATE + i % 3], format, 0);
    return (Experts){matrix(16, HIDDEN, format, 0), all, EXPERTS, 2, format != BF16};
}
static Pairing *adapter(i64 r, i64 format) {
    Pairing *all = calloc(LAYERS * SLOTS, sizeof(Pairing));
    for (i64 i = 0; i < LAYERS * SLOTS; i++)
        if (i % 5 != r % 5)
            all[i] = (Pairing){r, format, numbers(r * INPUTS[i % SLOTS], format, 0.2), numbers(r * OUTPUTS[i % SLOTS], format, 0.2), 0.5f};
    return all;
}
typedef struct {
    i64 sequence, start, count;
} Chunk;
static char **pages[SEQUENCES];
static i64 tokens[SEQUENCES][LENGTH];

static void step(const Model *m, const Route *routes, const Chunk *chunks, i64 count, float logits[SEQUENCES][LENGTH][VOCABULARY], int threads) {
    i64 rows = 0, total = 0;
    for (i64 i = 0; i < count; i++) total += chunks[i].count;
    i64 *columns = malloc(5 * total * sizeof(i64));
    float *out = malloc(total * VOCABULARY * sizeof(float));
    for (i64 i = 0; i < count; i++)
        for (i64 t = 0; t < chunks[i].count; t++, rows++) {
            columns[rows] = tokens[chunks[i].sequence][chunks[i].start + t];
            columns[total + rows] = chunks[i].start + t;
            columns[2 * total + rows] = columns[3 * total + rows] = chunks[i].sequence;
            columns[4 * total + rows] = rows;
        }
    const Batch b = {total, total, columns, columns + total, columns + 2 * total, columns + 3 * total, columns + 4 * total,
                     (char *const *const *)pages, routes, 25, out};
    if (loradeck_step(m, &b, threads)) exit(2);
    rows = 0;
    for (i64 i = 0; i < count; i++)
        for (i64 t = 0; t < chunks[i].count; t++, rows++)
            memcpy(logits[chunks[i].sequence][chunks[i].start + t], out + rows * VOCABULARY, VOCABULARY * sizeof(float));
    free(columns);
    free(out);
}
static void new_pages(const Model *m) {
    for (i64 s = 0; s < SEQUENCES; s++) {
        if (!pages[s]) pages[s] = calloc((LENGTH + PAGE - 1) / PAGE, sizeof(char *));
        for (i64 p = 0; p * PAGE < LENGTH; p++) {
            free(pages[s][p]);
            pages[s][p] = calloc(1, loradeck_page_bytes(m));
        }
    }
}
static float alone[SEQUENCES][LENGTH][VOCABULARY], together_[SEQUENCES][LENGTH][VOCABULARY];

static int check(i64 format, i64 cache, i64 activation, i64 rounds) {
    state = 42;
    Layer layers[LAYERS];
    for (i64 i = 0; i < LAYERS; i++) {
        const i64 all = i % 2;
        Layer *l = layers + i;
        for (i64 slot = 0; slot < SLOTS; slot++) l->matrix[slot] = matrix(OUTPUTS[slot], INPUTS[slot], format, i == 1);
        l->attention_in = norm(HIDDEN), l->mlp_in = norm(HIDDEN);
        l->attention_out = i ? norm(HIDDEN) : 0, l->mlp_out = i ? norm(HIDDEN) : 0;
        l->query_norm = norm(all ? HEADS * DIM : DIM), l->key_norm = norm(all ? KEY_HEADS * DIM : DIM);
        l->cos = numbers(LENGTH * 8, F32, 1), l->sin = numbers(LENGTH * 8, F32, 1);
        l->turned = 16, l->window = i ? 0 : 20, l->norms_all = all;
        l->experts = i == 2 ? experts(format) : (Experts){0};
    }
    const Matrix head = matrix(VOCABULARY, HIDDEN, format, 0);
    const Model m = {LAYERS, HIDDEN, HEADS, KEY_HEADS, DIM, INTER, VOCABULARY, HIDDEN, DIM, activation, cache, F32, rounds, layers,
                     activation ? numbers(VOCABULARY * HIDDEN, F32, 1) : 0, norm(HIDDEN), head, head, 1e-5, 2, 0.2f, 5, 0.8f, 1.5f, 4};
    const i64 formats[] = {F32, BF16, F16};
    Use uses[SEQUENCES][2];
    Route routes[SEQUENCES];
    for (i64 s = 0; s < SEQUENCES; s++) {
        for (i64 n = 0; n < 2; n++) uses[s][n] = (Use){adapter(s * 2 + 1 + n, formats[(s + n) % 3]), 1 - 0.4f * n};
        routes[s] = (Route){uses[s], s % 3};
        for (i64 t = 0; t < LENGTH; t++) tokens[s][t] = (i64)(fabs(uniform()) * VOCABULARY) % VOCABULARY;
    }
    new_pages(&m);
    for (i64 s = 0; s < SEQUENCES; s++) step(&m, routes, (Chunk[]){{s, 0, LENGTH}}, 1, alone, 1);
    new_pages(&m);
    i64 at[SEQUENCES] = {0};
    for (i64 n = 0, count = 1; count; n++) {
        Chunk chunks[SEQUENCES];
        count = 0;
        for (i64 s = 0; s < SEQUENCES; s++) {
            i64 some = (n * 7 + s * 5) % 23, left = LENGTH - at[s];
            some = n > 12 || some > left ? left : some;
            if (some) chunks[count++] = (Chunk){s, at[s], some};
            at[s] += some;
        }
        if (count) step(&m, routes, chunks, count, together_, 1 + n % 5);
    }
    for (i64 s = 0; s < SEQUENCES; s++) printf("%ld %ld %.4f %.4f\n", (long)format, (long)s, alone[s][0][1], alone[s][LENGTH - 1][2]);
    return memcmp(alone, together_, sizeof alone) != 0;
}
/* Tokens of rows of several sizes, with numbers that are not finite in some, alone and together */
static int check_sampling(void) {
    enum { CHOICES = 48, TOPS = 9 };
    const i64 sizes[] = {1, 63, 64, 1000, 5000};
    int wrong = 0;
    state = 7;
    for (i64 n = 0; n < 5; n++) {
        Choice alone[CHOICES] = {0}, beside[CHOICES];
        float top[2][CHOICES][TOPS] = {0};
        i64 ids[2][CHOICES][TOPS] = {0};
        for (i64 i = 0; i < CHOICES; i++) {
            float *logits = numbers(sizes[n], F32, i % 7 ? 9 : 0), *adjusted = numbers(sizes[n], F32, 3);
            if (i % 6 == 5) logits[sizes[n] / 2] = i % 4 ? NAN : INFINITY;
            for (i64 t = 0; t < sizes[n] && i % 8 == 6; t++) (i % 3 ? adjusted : logits)[t] = -INFINITY;
            alone[i] = (Choice){.logits = logits, .adjusted = i % 5 == 4 ? adjusted : logits, .temperature = i % 4 * 0.5,
                                .top_p = i % 3 ? 1 : 0.95, .min_p = i % 9 ? 0 : 0.1, .u = fabs(uniform()),
                                .top_k = i % 2 ? 0 : 1 + i * sizes[n] / CHOICES, .scored = i % 3 != 1, .token = i % 11 ? -1 : 0};
            alone[i].tops = alone[i].scored ? (TOPS < sizes[n] ? TOPS : sizes[n]) : 0;
            beside[i] = alone[i];
            alone[i].top_ids = ids[0][i], alone[i].top_logprobs = top[0][i];
            beside[i].top_ids = ids[1][i], beside[i].top_logprobs = top[1][i];
        }
        if (loradeck_sample(beside, CHOICES, sizes[n], 1 + (int)n)) exit(2);
        for (i64 i = 0; i < CHOICES; i++) {
            if (loradeck_sample(alone + i, 1, sizes[n], 1)) exit(2);
            const Choice *a = alone + i, *b = beside + i;
            wrong |= a->token != b->token || memcmp(&a->largest, &b->largest, 3 * sizeof(float));
            if (isfinite(a->largest) && isfinite(a->best)) {
                wrong |= a->token < 0 || a->token >= sizes[n];
                printf("%ld %ld %ld %.4f\n", (long)sizes[n], (long)i, (long)a->token, a->logprob);
            }
        }
        wrong |= memcmp(top[0], top[1], sizeof top[0]) || memcmp(ids[0], ids[1], sizeof ids[0]);
    }
    return wrong;
}
int main(void) {
    int wrong = check_sampling();
    wrong |= check(BF16, BF16, SILU, 0);
#ifdef HALVES
    wrong |= check(Q4_1, BF16, GELU, 0) | check(IQ4_NL, BF16, SILU, 1);
#else
    wrong |= check(F32, F32, GELU, 0) | check(F16, F16, GELU_TANH, 0);
    wrong |= check(Q4_1, F32, SILU, 0) | check(Q5_0, F32, SILU, 1) | check(IQ4_NL, F32, GELU, 1);
#endif
    if (wrong) puts("a sequence has other bits beside others");
    return wrong;
}
