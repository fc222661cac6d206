/* Parts of the step by themselves. */
#include "step.c"

void exponentials(float *x, i64 count) {
    for (i64 i = 0; i < count; i += LANES) *(vec *)(x + i) = exponential(*(vec *)(x + i));
}
void tangents(float *x, i64 count) {
    for (i64 i = 0; i < count; i += LANES) *(vec *)(x + i) = tangent(*(vec *)(x + i));
}
void activations(float *x, i64 count, i64 activation) {
    for (i64 i = 0; i < count; i += LANES) *(vec *)(x + i) = activated(*(vec *)(x + i), activation);
}
void round_to(uint16_t *to, const float *x, i64 count, i64 format) {
    for (i64 i = 0; i < count; i++) to[i] = half_bits(x[i], (int)format);
}
void widen_from(float *to, const uint16_t *x, i64 count, i64 format) {
    for (i64 i = 0; i < count; i += LANES) *(vec *)(to + i) = load(x + i, (int)format);
}
/* sum (tiles, rows, 16) = x (rows, inputs) · W^T with x rounded to 8 bits; x and W have whole groups */
void rounded(const Matrix *m, const float *x, i64 rows, float *sum) {
    const i64 inputs = m->groups * 32;
    const Panel p = {malloc(rows * inputs * sizeof(num)), rows, malloc(rows * m->groups * sizeof(Rounded))};
    for (i64 r = 0; r < rows; r++)
        for (i64 g = 0; g < m->groups; g++) {
            for (i64 i = 0; i < 32; i += LANES) put(panel_at(&p, r, g) + i, *(vec *)(x + r * inputs + g * 32 + i));
            round_group(&p, r, g);
        }
    tiles_of(sum, rows * 16, m, 0, (int)m->tiles, &p, 0, rows);
    free(p.numbers);
    free(p.rounded);
}
