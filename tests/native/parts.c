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
