/* The loops of the mlwe backend that touch every ciphertext value, fused so that each value is read and written once.
 *
 * Every function works on a range of rows, so that callers spread rows over threads, and gives the same integers as
 * the portable tensor code: all results are rounded to exact integers before they leave a transform.
 *
 * Layout: eight rows at a time stand side by side in the lanes of a vector, so that a transform of one row is plain
 * arithmetic on vectors with no shuffles. Such a group of rows is a "pack". Built without OpenMP: a second OpenMP
 * runtime beside torch's would fight it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define TOKENS 64 /* columns that are encrypted at a time */
#define LINE_ROWS 16 /* rows whose floats of one token fill a line of the cache */
#define ROWS 64      /* rows of a block: what is read and written lies together for 256 bytes, either way */

#define HALF 128 /* complex coefficients of a folded polynomial of degree 256 */
#define DEGREE (2 * HALF)
static const double PI = 3.14159265358979323846;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Blocks of rows and tokens, `row` and `first` being the first of each; rows of a line of the cache at a time. */
#define EACH_BLOCK(rows, tokens)                                                                                       \
    for (int64_t top = 0; top < (rows); top += ROWS)                                                                   \
        for (int64_t first = 0; first < (tokens); first += TOKENS)                                                     \
            for (int64_t row = top; row < least(rows, top + ROWS); row += LINE_ROWS)

/* Fetches what the next block of tokens reads of a row of masks, which no processor foresees. */
INLINE void fetch_masks(const int32_t *next) {
    for (int64_t t = 0; t < TOKENS; t += 64 / (int64_t)sizeof *next)
        __builtin_prefetch(next + t);
}

/* Zeros that stay, though nobody reads them: a compiler may leave out a memset before free. */
INLINE void wipe(void *memory, size_t size) {
    memset(memory, 0, size);
    __asm__ __volatile__("" : : "r"(memory) : "memory");
}

typedef struct {
    _Alignas(64) double re[LANES];
    double im[LANES];
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

/* Loops over lanes are written out, since compilers turn these into the widest vectors that there are; of a vector type
 * that is wider than the machine's gcc 12 passes every operand through memory. */
#define EACH_LANE for (int l = 0; l < LANES; l++)

INLINE void forward(cvec *z) {
    int n = HALF / 2, node = 1;
    for (; n >= 1; n /= 2) {
        int blocks = HALF / (2 * n);
        for (int block = 0; block < blocks; block++, node++) {
            double wr = twiddle[node].re, wi = twiddle[node].im;
            cvec *restrict u = z + 2 * n * block, *restrict v = z + 2 * n * block + n;
            for (int i = 0; i < n; i++) {
                double tr[LANES], ti[LANES], ur[LANES], ui[LANES];
                EACH_LANE {
                    tr[l] = v[i].re[l] * wr - v[i].im[l] * wi;
                    ti[l] = v[i].re[l] * wi + v[i].im[l] * wr;
                    ur[l] = u[i].re[l];
                    ui[l] = u[i].im[l];
                }
                EACH_LANE {
                    u[i].re[l] = ur[l] + tr[l];
                    u[i].im[l] = ui[l] + ti[l];
                    v[i].re[l] = ur[l] - tr[l];
                    v[i].im[l] = ui[l] - ti[l];
                }
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
            cvec *restrict u = z + 2 * n * block, *restrict v = z + 2 * n * block + n;
            for (int i = 0; i < n; i++) {
                double dr[LANES], di[LANES];
                EACH_LANE {
                    dr[l] = u[i].re[l] - v[i].re[l];
                    di[l] = u[i].im[l] - v[i].im[l];
                    u[i].re[l] += v[i].re[l];
                    u[i].im[l] += v[i].im[l];
                }
                EACH_LANE {
                    v[i].re[l] = dr[l] * wr - di[l] * wi;
                    v[i].im[l] = dr[l] * wi + di[l] * wr;
                }
            }
        }
    }
}

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Rounds to nearest and keeps the low 32 bits; |v| < 2^51. */
INLINE int32_t low_bits(double v) {
    double shifted = v + 6755399441055744.0;
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int32_t)bits;
}

/* The value of three or four bytes that lie `stride` apart, lowest first, at the top of 32 bits. */
INLINE uint32_t lifted(const uint8_t *from, int64_t stride, int planes) {
    uint32_t v = (uint32_t)from[0] | (uint32_t)from[stride] << 8 | (uint32_t)from[2 * stride] << 16;
    return planes == 3 ? v << 8 : v | (uint32_t)from[3 * stride] << 24;
}

/* Transforms of secrets, divided by HALF: s (count, DEGREE) double in folded order -> out (count, HALF) complex. */
CLONES void ct_transform_secrets(const double *s, complex64x2 *out, int64_t count) {
    cvec z[HALF];
    for (int64_t j = 0; j < count; j++) {
        for (int i = 0; i < HALF; i++) {
            EACH_LANE {
                z[i].re[l] = s[j * DEGREE + 2 * i];
                z[i].im[l] = s[j * DEGREE + 2 * i + 1];
            }
        }
        forward(z);
        for (int i = 0; i < HALF; i++) {
            out[j * HALF + i].re = z[i].re[0] / HALF;
            out[j * HALF + i].im = z[i].im[0] / HALF;
        }
    }
    wipe(z, sizeof z);
}

/* Transforms of ring elements: a (rows, rank, DEGREE) int32 -> out, packs of (rank, HALF) vectors. */
CLONES void ct_transform_rows(const int32_t *a, int64_t rank, int64_t rows, double *out) {
    int64_t n = rank * DEGREE;
    for (int64_t row = 0; row < rows; row += LANES) {
        double *flat = out + row * n;
        int count = rows - row < LANES ? (int)(rows - row) : LANES;
        for (int64_t i = 0; i < n; i++)
            for (int lane = 0; lane < LANES; lane++)
                flat[i * LANES + lane] = lane < count ? a[(row + lane) * n + i] : 0;
        for (int64_t r = 0; r < rank; r++)
            forward((cvec *)flat + r * HALF);
    }
}

/* Rounds ring elements to their top 24 bits, in the order in which ct_hint_masks reads them.
 *
 * h (rows, n) int32 -> out, packs of (n, 3, LANES) bytes, lowest plane first; a pack's missing rows are zero.
 * `first` is the row of `out` that the first row goes to. Packs are shared by calls: not for several threads.
 */
void ct_pack_hints(const int32_t *h, int64_t n, int64_t rows, int64_t first, uint8_t *out) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = first + r;
        uint8_t *pack = out + row / LANES * n * 3 * LANES + row % LANES;
        for (int64_t i = 0; i < n; i++) {
            uint32_t v = ((uint32_t)h[r * n + i] + 128) >> 8;
            pack[(3 * i + 0) * LANES] = (uint8_t)v;
            pack[(3 * i + 1) * LANES] = (uint8_t)(v >> 8);
            pack[(3 * i + 2) * LANES] = (uint8_t)(v >> 16);
        }
    }
}

/* One block of <a, s_j> for LANES rows: z (HALF) in folded order. */
INLINE void inner_block(const cvec *values, const complex64x2 *secret, int rank, cvec *z) {
    for (int i = 0; i < HALF; i++) {
        double re[LANES] = {0}, im[LANES] = {0};
        for (int r = 0; r < rank; r++) {
            const cvec *v = values + r * HALF + i;
            double sr = secret[r * HALF + i].re, si = secret[r * HALF + i].im;
            EACH_LANE {
                re[l] += v->re[l] * sr - v->im[l] * si;
                im[l] += v->re[l] * si + v->im[l] * sr;
            }
        }
        EACH_LANE {
            z[i].re[l] = re[l];
            z[i].im[l] = im[l];
        }
    }
    inverse(z);
}

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* Low 32 bits of eight values rounded to nearest; |v| < 2^51. */
INLINE void low_bits_of(const double *v, ivec *out) {
    int32_t bits[LANES];
    EACH_LANE bits[l] = low_bits(v[l]);
    memcpy(out, bits, sizeof bits);
}

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#else
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

/* Transposes eight vectors of eight. */
INLINE void transpose(ivec *m) {
    ivec a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = SHUFFLE(m[2 * i], m[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[2 * i + 1] = SHUFFLE(m[2 * i], m[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + j + 2] = SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        m[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        m[i + 4] = SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Writes a block's integers, shifted left, to `count` rows of `out`, `width` of its columns. */
INLINE void write_block(const cvec *z, int lift, int count, int64_t width, int32_t *out, int64_t stride) {
    const double *flat = (const double *)z;
    for (int64_t t = 0; t < width; t += 8) {
        ivec m[8];
        for (int i = 0; i < 8; i++) {
            low_bits_of(flat + (t + i) * LANES, m + i);
            m[i] <<= lift;
        }
        transpose(m);
        size_t bytes = (width - t < 8 ? width - t : 8) * sizeof(int32_t);
        for (int lane = 0; lane < count; lane++)
            memcpy(out + lane * stride + t, &m[lane], bytes);
    }
}

/* <a, s> + e for `rows` features, mod 2^32.
 *
 * values   from ct_transform_rows, of `stored` ring elements a row, of which the first `rank` count
 * secrets  (ceil(tokens / DEGREE), rank, HALF)
 * noise    (rows, noise_bytes); narrow 0: a byte a token, uniform; narrow 1: `tokens` 32-bit words, then `tokens`
 *          16-bit words, for the centred binomial of 42 bits
 * out      (rows, tokens) int32
 */
CLONES int ct_masks(const double *values, int64_t stored, const complex64x2 *secrets, int64_t rank, int64_t tokens,
                    int64_t rows, const uint8_t *noise, int64_t noise_bytes, int64_t narrow, int32_t *out) {
    cvec *z = aligned_alloc(64, padded(sizeof(cvec) * HALF));
    if (!z)
        return 1;
    for (int64_t row = 0; row < rows; row += LANES) {
        int count = rows - row < LANES ? (int)(rows - row) : LANES;
        const cvec *pack = (const cvec *)(values + row * stored * DEGREE);
        for (int64_t t = 0; t < tokens; t += DEGREE) {
            inner_block(pack, secrets + t / DEGREE * rank * HALF, (int)rank, z);
            write_block(z, 0, count, tokens - t < DEGREE ? tokens - t : DEGREE, out + row * tokens + t, tokens);
        }
        for (int lane = 0; lane < count; lane++) {
            int32_t *line = out + (row + lane) * tokens;
            const uint8_t *bits = noise + (row + lane) * noise_bytes;
            if (!narrow) {
                for (int64_t t = 0; t < tokens; t++)
                    line[t] = (int32_t)((uint32_t)line[t] + bits[t]);
                continue;
            }
            /* Constant time, and the same integers on every machine. */
            for (int64_t t = 0; t < tokens; t++) {
                uint32_t word;
                uint16_t half;
                memcpy(&word, bits + 4 * t, 4);
                memcpy(&half, bits + 4 * tokens + 2 * t, 2);
                int e = __builtin_popcount(word) + __builtin_popcount(half & 0x3FF) - 21;
                line[t] = (int32_t)((uint32_t)line[t] + (uint32_t)e);
            }
        }
    }
    wipe(z, sizeof(cvec) * HALF);
    free(z);
    return 0;
}

/* <h, s> of hints for `rows` outputs, mod 2^32: hints from ct_pack_hints -> out (rows, tokens) int32. */
CLONES int ct_hint_masks(const uint8_t *hints, const complex64x2 *secrets, int64_t rank, int64_t tokens, int64_t rows,
                         int32_t *out) {
    int64_t n = rank * DEGREE;
    size_t values_size = padded(sizeof(cvec) * HALF * rank), z_size = padded(sizeof(cvec) * HALF);
    char *memory = aligned_alloc(64, values_size + z_size);
    if (!memory)
        return 1;
    cvec *values = (cvec *)memory, *z = (cvec *)(memory + values_size);
    for (int64_t row = 0; row < rows; row += LANES) {
        int count = rows - row < LANES ? (int)(rows - row) : LANES;
        const uint8_t *pack = hints + row * n * 3;
        double *flat = (double *)values;
        for (int64_t i = 0; i < n; i++) {
            EACH_LANE flat[i * LANES + l] = (double)((int32_t)lifted(pack + 3 * i * LANES + l, LANES, 3) >> 8);
        }
        for (int64_t r = 0; r < rank; r++)
            forward(values + r * HALF);
        for (int64_t t = 0; t < tokens; t += DEGREE) {
            inner_block(values, secrets + t / DEGREE * rank * HALF, (int)rank, z);
            write_block(z, 8, count, tokens - t < DEGREE ? tokens - t : DEGREE, out + row * tokens + t, tokens);
        }
    }
    wipe(memory, values_size + z_size);
    free(memory);
    return 0;
}

/* b = floor((mask + round(scale * x)) / 2^shift) as byte planes, for `rows` features.
 *
 * mask     (rows, tokens) int32, the values of a row and of a token so many apart
 * x        first feature's column of (tokens, x_stride) float; scale (tokens) double
 * out      (rows, planes, out_stride) bytes, lowest plane first, of which `tokens` columns are written; shift is
 *          32 - 8 * planes
 */
CLONES void ct_encrypt(const int32_t *mask, int64_t row_step, int64_t token_step, const float *x, int64_t x_stride,
                       const double *scale, int64_t tokens, int64_t rows, int64_t planes, uint8_t *out,
                       int64_t out_stride) {
    int shift = 32 - 8 * (int)planes;
    EACH_BLOCK(rows, tokens) {
        int64_t width = least(TOKENS, tokens - first), count = least(LINE_ROWS, rows - row);
        int32_t turned[LINE_ROWS][TOKENS];
        for (int64_t t = first + TOKENS; t < tokens && t < first + 2 * TOKENS; t++)
            __builtin_prefetch(x + t * x_stride + row, 0, 2);
        for (int64_t t = 0; t < width; t += LANES)
            /* The input is token-major: eight features of eight tokens are turned over in registers. Its lines
             * lie so far apart that they displace each other, so both halves of each are read at once. */
            for (int64_t half = 0; half < count; half += LANES) {
                int64_t some = count - half < LANES ? count - half : LANES;
                ivec m[LANES] = {{0}};
                for (int64_t i = 0; i < LANES && t + i < width; i++) {
                    const float *in = x + (first + t + i) * x_stride + row + half;
                    double v[LANES] = {0}, s = scale[first + t + i];
                    if (some == LANES)
                        EACH_LANE v[l] = (double)in[l] * s;
                    else
                        for (int l = 0; l < some; l++)
                            v[l] = (double)in[l] * s;
                    low_bits_of(v, m + i);
                }
                transpose(m);
                EACH_LANE memcpy(turned[half + l] + t, m + l, sizeof *m);
            }
        for (int64_t lane = 0; lane < count; lane++) {
            const int32_t *masks = mask + (row + lane) * row_step + first * token_step, *in = turned[lane];
            uint8_t *to = out + (row + lane) * planes * out_stride + first;
            uint32_t value[TOKENS];
            if (token_step == 1 && first + TOKENS < tokens)
                fetch_masks(masks + TOKENS);
            if (token_step == 1)
                for (int64_t t = 0; t < width; t++)
                    value[t] = ((uint32_t)in[t] + (uint32_t)masks[t]) >> shift;
            else
                for (int64_t t = 0; t < width; t++)
                    value[t] = ((uint32_t)in[t] + (uint32_t)masks[t * token_step]) >> shift;
            for (int64_t p = 0; p < planes; p++, to += out_stride)
                for (int64_t t = 0; t < width; t++)
                    to[t] = (uint8_t)(value[t] >> (8 * p));
        }
    }
}

/* y = centred(2^shift * reply - mask) * unit, for `rows` outputs, counted in units of 2^-32 of the modulus.
 *
 * reply (rows, planes, reply_stride) bytes; mask as in ct_encrypt; unit (tokens) float; y (tokens, y_stride), of which
 * `rows` columns are written
 */
CLONES void ct_decrypt(const uint8_t *reply, int64_t reply_stride, const int32_t *mask, int64_t row_step,
                       int64_t token_step, const float *unit, int64_t tokens, int64_t rows, int64_t planes, float *y,
                       int64_t y_stride) {
    /* As in ct_encrypt, the other way round. */
    EACH_BLOCK(rows, tokens) {
        int64_t width = least(TOKENS, tokens - first), count = least(LINE_ROWS, rows - row);
        const uint8_t *in = reply + row * planes * reply_stride + first;
        const int32_t *masks = mask + row * row_step + first * token_step;
        float *out = y + first * y_stride + row;
        if (token_step != 1 || width < LANES) {
            for (int64_t t = 0; t < width; t++)
                for (int64_t i = 0; i < count; i++)
                    out[t * y_stride + i] =
                        (float)(int32_t)(lifted(in + i * planes * reply_stride + t, reply_stride, (int)planes) -
                                         (uint32_t)masks[i * row_step + t * token_step]) *
                        unit[first + t];
            continue;
        }
        int32_t straight[LINE_ROWS][TOKENS];
        for (int64_t i = 0; i < count; i++) {
            const uint8_t *from = in + i * planes * reply_stride;
            const int32_t *by = masks + i * row_step;
            if (first + TOKENS < tokens) {
                fetch_masks(by + TOKENS);
                for (int64_t p = 0; p < planes; p++)
                    __builtin_prefetch(from + p * reply_stride + TOKENS);
            }
            if (planes == 3)
                for (int64_t t = 0; t < width; t++)
                    straight[i][t] = (int32_t)(lifted(from + t, reply_stride, 3) - (uint32_t)by[t]);
            else
                for (int64_t t = 0; t < width; t++)
                    straight[i][t] = (int32_t)(lifted(from + t, reply_stride, 4) - (uint32_t)by[t]);
        }
        for (int64_t t = 0; t < width; t += LANES)
            for (int64_t half = 0; half < count; half += LANES) {
                ivec m[LANES];
                int64_t some = width - t < LANES ? width - t : LANES;
                int64_t high = count - half < LANES ? count - half : LANES;
                for (int64_t i = 0; i < LANES; i++)
                    memcpy(m + i, straight[half + i] + t, sizeof *m);
                transpose(m);
                for (int64_t i = 0; i < some; i++) {
                    int32_t v[LANES];
                    float turned[LANES], by = unit[first + t + i], *to = out + (t + i) * y_stride + half;
                    memcpy(v, m + i, sizeof v);
                    EACH_LANE turned[l] = (float)v[l] * by;
                    if (high == LANES)
                        memcpy(to, turned, sizeof turned);
                    else
                        memcpy(to, turned, (size_t)high * sizeof *turned);
                }
            }
    }
}

/* Euclidean norms of tokens: x (tokens, x_stride) float, of which `features` columns count -> out (tokens) double. */
CLONES void ct_norms(const float *x, int64_t x_stride, int64_t features, int64_t tokens, double *out) {
    for (int64_t t = 0; t < tokens; t++) {
        const float *in = x + t * x_stride;
        double sums[4 * LANES] = {0}, total = 0;
        int64_t k = 0;
        for (; k + 4 * LANES <= features; k += 4 * LANES)
            for (int l = 0; l < 4 * LANES; l++)
                sums[l] += (double)in[k + l] * (double)in[k + l];
        for (; k < features; k++)
            total += (double)in[k] * (double)in[k];
        for (int l = 0; l < 4 * LANES; l++)
            total += sums[l];
        out[t] = sqrt(total);
    }
}

/* What is encrypted of tokens whose scales follow from their norms: see ct_encrypt and ct_norms.
 *
 * norm  of a token times its scale; a norm below 1e-30 counts as that
 * unit  (tokens) float to write to, the inverse scales
 */
void ct_encode(const int32_t *mask, int64_t row_step, int64_t token_step, const float *x, int64_t x_stride, double norm,
               int64_t tokens, int64_t rows, int64_t planes, uint8_t *out, float *unit) {
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        int64_t width = least(TOKENS, tokens - first);
        double scale[TOKENS];
        ct_norms(x + first * x_stride, x_stride, rows, width, scale);
        for (int64_t t = 0; t < width; t++) {
            scale[t] = 1.0 / (scale[t] < 1e-30 ? 1e-30 : scale[t]) * norm;
            unit[first + t] = (float)(1.0 / scale[t]);
        }
        ct_encrypt(mask + first * token_step, row_step, token_step, x + first * x_stride, x_stride, scale, width, rows,
                   planes, out + first, tokens);
    }
}

#define DRAWN 8 /* vectors that are usual, whose sums stay in registers */
#define DEEP 32 /* rows whose values are read at a time */
typedef uint32_t uvec __attribute__((vector_size(32), aligned(4)));

/* sums[j][t] += weights[j][row] * value[row][t], of DRAWN vectors and eight tokens. */
INLINE void add_weighted(const uint32_t (*value)[TOKENS], const int32_t *weights, int64_t stride, int64_t rows,
                         uint32_t (*sums)[TOKENS]) {
    uvec s[DRAWN];
    for (int j = 0; j < DRAWN; j++)
        memcpy(&s[j], sums[j], sizeof s[j]);
    for (int64_t row = 0; row < rows; row++) {
        uvec v;
        memcpy(&v, value[row], sizeof v);
        for (int j = 0; j < DRAWN; j++)
            s[j] += v * (uint32_t)weights[j * stride + row];
    }
    for (int j = 0; j < DRAWN; j++)
        memcpy(sums[j], &s[j], sizeof s[j]);
}

#define FEW 16 /* tokens up to which loops run over rows */
#define MOST_VECTORS 64
#define LINE 256 /* rows of such a loop */

/* out (count, out_stride) = weights (count, rows), of one byte or four, times values, of a few tokens. */
INLINE void few_weighted(const uint8_t *in, int64_t in_stride, int64_t plane_stride, int64_t planes, int64_t rows,
                         int64_t tokens, const void *weights, int64_t weight_bytes, int64_t count, int32_t *out,
                         int64_t out_stride) {
    uint32_t line[FEW][LINE];
    for (int64_t j = 0; j < count; j++)
        memset(out + j * out_stride, 0, tokens * sizeof *out);
    for (int64_t start = 0; start < rows; start += LINE) {
        int64_t deep = rows - start < LINE ? rows - start : LINE;
        for (int64_t row = 0; row < deep; row++) {
            const uint8_t *from = in + (start + row) * in_stride;
            for (int64_t t = 0; t < tokens; t++)
                line[t][row] = planes == 3 ? lifted(from + t, plane_stride, 3) : lifted(from + t, plane_stride, 4);
        }
        for (int64_t j = 0; j < count; j++)
            for (int64_t t = 0; t < tokens; t++) {
                const int8_t *narrow = (const int8_t *)weights + j * rows + start;
                const int32_t *wide = (const int32_t *)weights + j * rows + start;
                uint32_t sum = 0;
                if (weight_bytes == 1)
                    for (int64_t row = 0; row < deep; row++)
                        sum += line[t][row] * (uint32_t)(int32_t)narrow[row];
                else
                    for (int64_t row = 0; row < deep; row++)
                        sum += line[t][row] * (uint32_t)wide[row];
                out[j * out_stride + t] = (int32_t)((uint32_t)out[j * out_stride + t] + sum);
            }
    }
}

/* out = sum over rows of weight x value, mod 2^32, values lifted to the top of 32 bits: check vectors times ciphertext.
 *
 * in (rows, planes, tokens) bytes; weights (count, rows) int32, or up to FEW tokens int8; out (count, out_stride) int32
 */
CLONES void ct_weighted_sums(const uint8_t *in, int64_t in_stride, int64_t plane_stride, int64_t planes, int64_t rows,
                             int64_t tokens, const void *weights, int64_t weight_bytes, int64_t count, int32_t *out,
                             int64_t out_stride) {
    if (count != DRAWN || tokens <= FEW) {
        for (int64_t first = 0; first < tokens; first += FEW)
            few_weighted(in + first, in_stride, plane_stride, planes, rows, tokens - first < FEW ? tokens - first : FEW,
                         weights, weight_bytes, count, out + first, out_stride);
        return;
    }
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        int64_t width = tokens - first < TOKENS ? tokens - first : TOKENS;
        uint32_t sums[DRAWN][TOKENS] = {{0}}, value[DEEP][TOKENS] = {{0}};
        for (int64_t start = 0; start < rows; start += DEEP) {
            int64_t deep = rows - start < DEEP ? rows - start : DEEP;
            for (int64_t row = 0; row < deep; row++) {
                const uint8_t *from = in + (start + row) * in_stride + first;
                if (planes == 3)
                    for (int64_t t = 0; t < width; t++)
                        value[row][t] = lifted(from + t, plane_stride, 3);
                else
                    for (int64_t t = 0; t < width; t++)
                        value[row][t] = lifted(from + t, plane_stride, 4);
            }
            for (int64_t t = 0; t < width; t += 8)
                add_weighted((const uint32_t(*)[TOKENS])(value[0] + t), (const int32_t *)weights + start, rows, deep,
                             (uint32_t(*)[TOKENS])(sums[0] + t));
        }
        for (int64_t j = 0; j < DRAWN; j++)
            memcpy(out + j * out_stride + first, sums[j], width * sizeof *out);
    }
}

/* Whether left x reply = right x request, mod 2^32 of values lifted to the top, for every digit of a weight: 1 or 0, in
 * a time that does not tell which sums differ.
 *
 * reply    (digits * rows, planes, tokens) bytes, up to FEW tokens; left (count, rows) int8, up to MOST_VECTORS
 * request  (features, planes, tokens) bytes, rows and planes so many apart; right (digits, count, features) int32
 */
int64_t ct_agrees(const uint8_t *reply, const int8_t *left, int64_t rows, int64_t digits, const uint8_t *request,
                  int64_t request_stride, int64_t plane_stride, const int32_t *right, int64_t features, int64_t planes,
                  int64_t tokens, int64_t count) {
    int32_t of_reply[MOST_VECTORS * FEW], of_request[MOST_VECTORS * FEW];
    uint32_t apart = 0;
    for (int64_t digit = 0; digit < digits; digit++) {
        ct_weighted_sums(reply + digit * rows * planes * tokens, planes * tokens, tokens, planes, rows, tokens, left, 1,
                         count, of_reply, tokens);
        ct_weighted_sums(request, request_stride, plane_stride, planes, features, tokens,
                         right + digit * count * features, 4, count, of_request, tokens);
        for (int64_t i = 0; i < count * tokens; i++)
            apart |= (uint32_t)of_reply[i] ^ (uint32_t)of_request[i];
    }
    return apart == 0;
}

/* Byte planes of values: (rows, columns) int32 -> (rows, planes, plane_stride) bytes, lowest plane first. */
CLONES void ct_split(const int32_t *values, int64_t rows, int64_t columns, int64_t planes, uint8_t *out,
                     int64_t out_stride, int64_t plane_stride) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t p = 0; p < planes; p++) {
            uint8_t *to = out + row * out_stride + p * plane_stride;
            const int32_t *in = values + row * columns;
            for (int64_t c = 0; c < columns; c++)
                to[c] = (uint8_t)((uint32_t)in[c] >> (8 * p));
        }
}

/* Values of byte planes as doubles, centred: (rows, planes, plane_stride) bytes -> (rows, columns) double. */
CLONES void ct_join(const uint8_t *in, int64_t in_stride, int64_t plane_stride, int64_t planes, int64_t rows,
                    int64_t columns, double *out) {
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *from = in + row * in_stride;
        double *to = out + row * columns;
        if (planes == 3)
            for (int64_t c = 0; c < columns; c++)
                to[c] = (double)((int32_t)lifted(from + c, plane_stride, 3) >> 8);
        else
            for (int64_t c = 0; c < columns; c++)
                to[c] = (double)(int32_t)lifted(from + c, plane_stride, 4);
    }
}

/* total (+)= low 32 bits of values rounded to nearest, |v| < 2^51; `add` 0 overwrites. */
CLONES void ct_low_bits(const double *values, int64_t count, int64_t add, int32_t *total) {
    if (add)
        for (int64_t i = 0; i < count; i++)
            total[i] = (int32_t)((uint32_t)total[i] + (uint32_t)low_bits(values[i]));
    else
        for (int64_t i = 0; i < count; i++)
            total[i] = low_bits(values[i]);
}

/* total (+)= sum over p of partial_p << 8 p, less the offset of a row: planes were made signed by subtracting 128. */
CLONES void ct_combine(const int32_t *partial, const int32_t *row_sums, int64_t rows, int64_t columns, int64_t planes,
                       int64_t add, int32_t *total) {
    for (int64_t row = 0; row < rows; row++) {
        uint32_t offset = 0, each = (uint32_t)row_sums[row] << 7;
        for (int p = 0; p < planes; p++)
            offset += each << (8 * p);
        const int32_t *in = partial + row * planes * columns;
        uint32_t *out = (uint32_t *)total + row * columns;
        for (int64_t c = 0; c < columns; c++) {
            uint32_t value = offset + (add ? out[c] : 0);
            for (int p = 0; p < planes; p++)
                value += (uint32_t)in[p * columns + c] << (8 * p);
            out[c] = value;
        }
    }
}
