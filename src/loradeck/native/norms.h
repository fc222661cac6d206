/* x / sqrt(mean(x^2) + eps) · weight, with sums in float32 */
#ifndef NORMS_H
#define NORMS_H
#include "product.h"

/* 1 / sqrt(mean(x^2) + eps) of `count` numbers, which zeros follow up to a multiple of 32 */
INLINE float sum_of_squares(const float *x, i64 count) {
    vec sum = zero();
    for (i64 i = 0; i < count; i += LANES) sum += *(const vec *)(x + i) * *(const vec *)(x + i);
    return total(sum);
}
INLINE float inverse_rms(float squares, i64 count, double eps) { return 1.0f / sqrtf(squares / count + (float)eps); }

/* hidden += scale · out_norm(branch), where there is a branch; x = in_norm(hidden). A norm that is null changes nothing. */
static void add_and_norm(float *hidden, const float *branch, const float *out_norm, float scale, const float *in_norm,
                         const Panel *x, i64 row, i64 count, i64 padded, double eps) {
    if (branch) {
        float factor = out_norm ? inverse_rms(sum_of_squares(branch, padded), count, eps) : 1.0f;
        for (i64 i = 0; i < padded; i += LANES) {
            vec b = *(const vec *)(branch + i) * factor;
            if (out_norm) b = b * *(const vec *)(out_norm + i);
            *(vec *)(hidden + i) += b * scale;
        }
    }
    float factor = in_norm ? inverse_rms(sum_of_squares(hidden, padded), count, eps) : 1.0f;
    for (i64 i = 0; i < padded; i += LANES) {
        vec v = *(const vec *)(hidden + i) * factor;
        if (in_norm) v = v * *(const vec *)(in_norm + i);
        put(panel_at(x, row, i / 32) + i % 32, v);
    }
    for (i64 g = 0; g < padded / 32; g++) round_group(x, row, g);
}

#endif
