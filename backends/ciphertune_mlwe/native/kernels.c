/* The loops of the mlwe backend that touch every ciphertext value, fused so that each value is read and written once.
 *
 * Every function works on a range of rows, so that callers spread rows over threads, and gives the same integers as
 * the portable tensor code: all results are rounded to exact integers before they leave a transform.
 *
 * Layout: eight rows at a time stand side by side in the lanes of a vector, so that a transform of one row is plain
 * arithmetic on vectors with no shuffles. Built without OpenMP: a second OpenMP runtime beside torch's would fight it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define HALF 128 /* complex coefficients of a folded polynomial of degree 256 */
#define DEGREE (2 * HALF)
static const double PI = 3.14159265358979323846;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef double vec __attribute__((vector_size(8 * LANES)));
typedef struct {
    vec re, im;
} cvec;
typedef struct {
    double re, im;
} complex64x2;

/* Twiddles of C[X]/(X^HALF - i): at node m of level l the modulus X^n - c splits by w, w^2 = c. Built once. */
static complex64x2 twiddle[HALF];

/* Call once before anything else. */
void ct_init(void) {
    /* The node m (1-based heap order) holds angle of c; its twiddle has half that angle, children c = +w and -w. */
    double angle[2 * HALF];
    angle[1] = PI / 2;
    for (int m = 1; m < HALF; m++) {
        double w = angle[m] / 2;
        twiddle[m].re = cos(w);
        twiddle[m].im = sin(w);
        angle[2 * m] = w;
        angle[2 * m + 1] = w + PI;
    }
}

INLINE void forward(cvec *z) {
    int n = HALF / 2, node = 1;
    for (; n >= 1; n /= 2) {
        int blocks = HALF / (2 * n);
        for (int block = 0; block < blocks; block++, node++) {
            double wr = twiddle[node].re, wi = twiddle[node].im;
            cvec *u = z + 2 * n * block, *v = u + n;
            for (int i = 0; i < n; i++) {
                vec tr = v[i].re * wr - v[i].im * wi, ti = v[i].re * wi + v[i].im * wr;
                v[i].re = u[i].re - tr;
                v[i].im = u[i].im - ti;
                u[i].re += tr;
                u[i].im += ti;
            }
        }
    }
}

/* The inverse without its division by HALF, which the stored secrets carry. */
INLINE void inverse(cvec *z) {
    for (int n = 1; n < HALF; n *= 2) {
        int blocks = HALF / (2 * n), node = blocks;
        for (int block = 0; block < blocks; block++, node++) {
            double wr = twiddle[node].re, wi = -twiddle[node].im;
            cvec *u = z + 2 * n * block, *v = u + n;
            for (int i = 0; i < n; i++) {
                vec dr = u[i].re - v[i].re, di = u[i].im - v[i].im;
                u[i].re += v[i].re;
                u[i].im += v[i].im;
                v[i].re = dr * wr - di * wi;
                v[i].im = dr * wi + di * wr;
            }
        }
    }
}

/* Transforms of secrets, divided by HALF: s (count, DEGREE) double in folded order -> out (count, HALF) complex. */
CLONES void ct_transform_secrets(const double *s, complex64x2 *out, int64_t count) {
    cvec z[HALF];
    for (int64_t j = 0; j < count; j++) {
        for (int i = 0; i < HALF; i++) {
            z[i].re = (vec){0} + s[j * DEGREE + 2 * i];
            z[i].im = (vec){0} + s[j * DEGREE + 2 * i + 1];
        }
        forward(z);
        for (int i = 0; i < HALF; i++) {
            out[j * HALF + i].re = z[i].re[0] / HALF;
            out[j * HALF + i].im = z[i].im[0] / HALF;
        }
    }
}

/* The value of digit planes at one column range of one row, as int32 in units of the lowest digit. */
INLINE void compose(const int8_t *planes, int64_t stride, int count, int64_t columns, int32_t *out) {
    switch (count) {
    case 2:
        for (int64_t c = 0; c < columns; c++)
            out[c] = planes[c] + 256 * planes[stride + c];
        break;
    case 3:
        for (int64_t c = 0; c < columns; c++)
            out[c] = planes[c] + 256 * planes[stride + c] + 65536 * planes[2 * stride + c];
        break;
    default:
        for (int64_t c = 0; c < columns; c++)
            out[c] = (int32_t)((uint32_t)(planes[c] + 256 * planes[stride + c] + 65536 * planes[2 * stride + c]) +
                               ((uint32_t)(int32_t)planes[3 * stride + c] << 24));
    }
}

/* Balanced digits of one row of int32 values; the lowest `dropped` are rounded away. */
INLINE void split_row(const int32_t *values, int64_t columns, int8_t *out, int64_t stride, int planes, int dropped) {
    /* Adding 128 at every digit below one makes each carry what balanced digits carry. */
    uint32_t carry = 0;
    for (int i = 0; i < dropped; i++)
        carry += (uint32_t)128 << (8 * i);
    for (int p = 0; p < planes; p++) {
        int shift = 8 * (p + dropped);
        for (int64_t c = 0; c < columns; c++)
            out[p * stride + c] = (int8_t)(((uint32_t)values[c] + carry) >> shift);
        carry += (uint32_t)128 << shift;
    }
}

/* Transforms of the ring elements of LANES rows given as planes (rows, count, rank * DEGREE); missing rows are zero. */
INLINE void transform_rows(const int8_t *a, int64_t row_stride, int count, int rank, int rows, int32_t *line,
                           cvec *values) {
    int64_t n = (int64_t)rank * DEGREE;
    double *flat = (double *)values;
    for (int lane = 0; lane < LANES; lane++) {
        if (lane < rows)
            compose(a + lane * row_stride, n, count, n, line);
        else
            memset(line, 0, n * sizeof *line);
        for (int64_t i = 0; i < n; i++)
            flat[i * LANES + lane] = line[i];
    }
    for (int r = 0; r < rank; r++)
        forward(values + r * HALF);
}

/* One block of <a, s_j> for LANES rows: z (HALF) in folded order. */
INLINE void inner_block(const cvec *values, const complex64x2 *secret, int rank, cvec *z) {
    for (int i = 0; i < HALF; i++) {
        vec re = {0}, im = {0};
        for (int r = 0; r < rank; r++) {
            cvec v = values[r * HALF + i];
            double sr = secret[r * HALF + i].re, si = secret[r * HALF + i].im;
            re += v.re * sr - v.im * si;
            im += v.re * si + v.im * sr;
        }
        z[i].re = re;
        z[i].im = im;
    }
    inverse(z);
}

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Rounds to nearest and keeps the low 32 bits; |v| < 2^51. */
INLINE int32_t low_bits(double v) {
    double shifted = v + 6755399441055744.0;
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int32_t)bits;
}

/* b = <a, s> + e + round(scale * x) for `rows` features.
 *
 * a        (rows, 4, rank * DEGREE) int8: public digits
 * noise    (rows, noise_bytes): per row `tokens` 32-bit words, then `tokens` 16-bit words, little-endian
 * x        first feature's column of (tokens, x_stride) float; scale (tokens) double
 * secrets  (blocks, rank, HALF)
 * b        (rows, planes, tokens) int8
 * Returns 0, or 1 if memory ran out.
 */
CLONES int ct_encrypt(const int8_t *a, const uint8_t *noise, int64_t noise_bytes, const float *x, int64_t x_stride,
                      const double *scale, const complex64x2 *secrets, int64_t rank, int64_t tokens, int64_t rows,
                      int64_t planes, int64_t dropped, int8_t *b) {
    int64_t n = rank * DEGREE, blocks = (tokens + DEGREE - 1) / DEGREE;
    size_t values_size = padded(sizeof(cvec) * HALF * rank), z_size = padded(sizeof(cvec) * HALF);
    size_t line_size = padded(sizeof(int32_t) * (n > tokens ? n : tokens));
    size_t body_size = padded(sizeof(int32_t) * LANES * blocks * DEGREE);
    char *memory = aligned_alloc(64, values_size + z_size + line_size + body_size);
    if (!memory)
        return 1;
    cvec *values = (cvec *)memory, *z = (cvec *)(memory + values_size);
    int32_t *line = (int32_t *)(memory + values_size + z_size);
    int32_t *body = (int32_t *)(memory + values_size + z_size + line_size);
    for (int64_t row = 0; row < rows; row += LANES) {
        int count = rows - row < LANES ? (int)(rows - row) : LANES;
        transform_rows(a + row * 4 * n, 4 * n, 4, (int)rank, count, line, values);
        for (int64_t j = 0; j < blocks; j++) {
            inner_block(values, secrets + j * rank * HALF, (int)rank, z);
            const double *flat = (const double *)z;
            int64_t width = tokens - j * DEGREE < DEGREE ? tokens - j * DEGREE : DEGREE;
            for (int lane = 0; lane < count; lane++) {
                int32_t *out = body + lane * blocks * DEGREE + j * DEGREE;
                for (int64_t t = 0; t < width; t++)
                    out[t] = low_bits(flat[t * LANES + lane]);
            }
            /* The input is token-major: its eight features of one token share a cache line. */
            for (int64_t t = 0; t < width; t++) {
                const float *in = x + (j * DEGREE + t) * x_stride + row;
                double s = scale[j * DEGREE + t];
                for (int lane = 0; lane < count; lane++) {
                    int32_t *out = body + lane * blocks * DEGREE + j * DEGREE + t;
                    *out = (int32_t)((uint32_t)*out + (uint32_t)low_bits((double)in[lane] * s));
                }
            }
        }
        for (int lane = 0; lane < count; lane++) {
            int32_t *out = body + lane * blocks * DEGREE;
            const uint8_t *bits = noise + (row + lane) * noise_bytes;
            /* Centred binomial over 42 bits: constant time, and the same integers on every machine. */
            for (int64_t t = 0; t < tokens; t++) {
                uint32_t word;
                uint16_t half;
                memcpy(&word, bits + 4 * t, 4);
                memcpy(&half, bits + 4 * tokens + 2 * t, 2);
                int e = __builtin_popcount(word) + __builtin_popcount(half & 0x3FF) - 21;
                out[t] = (int32_t)((uint32_t)out[t] + (uint32_t)e);
            }
            split_row(out, tokens, b + (row + lane) * planes * tokens, tokens, (int)planes, (int)dropped);
        }
    }
    memset(memory, 0, values_size + z_size + line_size + body_size);
    free(memory);
    return 0;
}

/* y = centred(b - <a, s>) * unit for `rows` features, the phase counted in units of 2^-32 of the modulus.
 *
 * a (rows, a_planes, rank * DEGREE) and b (rows, b_planes, tokens) int8: top digits; unit (tokens) double
 * y first feature's column of (tokens, y_stride) float
 */
CLONES int ct_decrypt(const int8_t *a, const int8_t *b, const complex64x2 *secrets, const double *unit, int64_t rank,
                      int64_t tokens, int64_t rows, int64_t a_planes, int64_t b_planes, float *y, int64_t y_stride) {
    int64_t n = rank * DEGREE, blocks = (tokens + DEGREE - 1) / DEGREE;
    size_t values_size = padded(sizeof(cvec) * HALF * rank), z_size = padded(sizeof(cvec) * HALF);
    size_t line_size = padded(sizeof(int32_t) * n);
    size_t body_size = padded(sizeof(int32_t) * LANES * DEGREE);
    char *memory = aligned_alloc(64, values_size + z_size + line_size + body_size);
    if (!memory)
        return 1;
    cvec *values = (cvec *)memory, *z = (cvec *)(memory + values_size);
    int32_t *line = (int32_t *)(memory + values_size + z_size);
    int32_t *body = (int32_t *)(memory + values_size + z_size + line_size);
    int a_lift = 32 - 8 * (int)a_planes, b_lift = 32 - 8 * (int)b_planes;
    for (int64_t row = 0; row < rows; row += LANES) {
        int count = rows - row < LANES ? (int)(rows - row) : LANES;
        transform_rows(a + row * a_planes * n, a_planes * n, (int)a_planes, (int)rank, count, line, values);
        for (int64_t j = 0; j < blocks; j++) {
            inner_block(values, secrets + j * rank * HALF, (int)rank, z);
            const double *flat = (const double *)z;
            int64_t width = tokens - j * DEGREE < DEGREE ? tokens - j * DEGREE : DEGREE;
            for (int lane = 0; lane < count; lane++) {
                int32_t *phase = body + lane * DEGREE;
                compose(b + (row + lane) * b_planes * tokens + j * DEGREE, tokens, (int)b_planes, width, phase);
                /* Lifting both to the top of 32 bits makes wrap-around the centred remainder. */
                for (int64_t t = 0; t < width; t++)
                    phase[t] = (int32_t)(((uint32_t)phase[t] << b_lift) -
                                         ((uint32_t)low_bits(flat[t * LANES + lane]) << a_lift));
            }
            for (int64_t t = 0; t < width; t++) {
                double u = unit[j * DEGREE + t];
                float *out = y + (j * DEGREE + t) * y_stride + row;
                for (int lane = 0; lane < count; lane++)
                    out[lane] = (float)(body[lane * DEGREE + t] * u);
            }
        }
    }
    memset(memory, 0, values_size + z_size + line_size + body_size);
    free(memory);
    return 0;
}

/* Top digits of the sum over p of partial_p * 256^power_p mod 2^32, for `rows` rows.
 *
 * partials (count) pointers to the first row, rows partial_stride apart; out rows out_stride apart, digits
 * plane_stride apart.
 */
CLONES void ct_combine(const int32_t *const *partials, const int64_t *powers, int64_t count, int64_t partial_stride,
                       int64_t rows, int64_t columns, int8_t *out, int64_t out_stride, int64_t plane_stride,
                       int64_t planes, int64_t dropped) {
    enum { WIDTH = 256 };
    int32_t total[WIDTH];
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < columns; start += WIDTH) {
            int64_t width = columns - start < WIDTH ? columns - start : WIDTH;
            for (int64_t p = 0; p < count; p++) {
                const int32_t *in = partials[p] + row * partial_stride + start;
                int shift = 8 * (int)powers[p];
                if (p == 0)
                    for (int64_t c = 0; c < width; c++)
                        total[c] = (int32_t)((uint32_t)in[c] << shift);
                else
                    for (int64_t c = 0; c < width; c++)
                        total[c] = (int32_t)((uint32_t)total[c] + ((uint32_t)in[c] << shift));
            }
            split_row(total, width, out + row * out_stride + start, plane_stride, (int)planes, (int)dropped);
        }
    }
}
