/* The product of int8 weights and values that are given as three or four byte planes, exact mod 2^24 or 2^32.
 *
 * Values are packed once for a block of columns, weights are expanded block by block into the cache, and a kernel's
 * tile multiplies a few rows by a panel of sixteen columns in registers. Results leave the cache as bytes. Weights are
 * read as they lie, row by row or column by column, so that one copy serves both directions.
 *
 * Sums are wanted mod 2^24 or 2^32 and wrap mod 2^32, so no depth is too great.
 *
 * Built with -DCT_EMULATE, plain loops stand in for the instructions that not every machine has, so that those kernels
 * can be tested anywhere. Built with -DCT_PLAIN, for compilers that refuse some of them, only plain C is left.
 */
#define _GNU_SOURCE /* syscall */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(CT_PLAIN)
#define X86
#include <cpuid.h>
#include <immintrin.h>
/* Older compilers come with assemblers that know neither AVX-VNNI nor AMX. */
#if defined(CT_EMULATE) || (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define X86_NEW
#endif
#endif
#if defined(__aarch64__) && defined(__GNUC__) && defined(__AARCH64EL__) && !defined(CT_PLAIN)
#define ARM
#endif
#if defined(__linux__) && defined(X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(ARM)
#include <sys/auxv.h>
#endif

#if defined(X86) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define TARGET(isa) __attribute__((target(isa)))
/* Instructions that the emulation does without. */
#if defined(CT_EMULATE)
#define LATER(isa)
#else
#define LATER(isa) TARGET(isa)
#endif

#define DEEP 384         /* features of a block: a panel of values and the codes of a tile stay in the first cache */
#define TALL 96          /* rows of a block, a multiple of the rows of every tile */
#define WIDE 16          /* columns of a panel */
#define VALUES (1 << 21) /* bytes of packed values to aim at */
#define MOST_ROWS 32     /* of a tile */

/* What a call multiplies; see ct_product. */
typedef struct {
    const int8_t *codes;
    int64_t row_stride, code_stride, rows, depth;
    const uint8_t *values;
    int64_t value_stride, plane_stride;
    int planes;
    int64_t columns;
    uint8_t *bytes;
    int64_t bytes_stride;
    int32_t *total;
    int64_t total_stride;
    int add;
} product;

typedef struct {
    const char *name;
    int (*available)(void);
    int rows[2];   /* of a tile, with three and four planes */
    int unit;      /* depth is filled up to a multiple of this with zeros */
    int few;       /* up to so many columns, products go without tiles */
    int row_bytes; /* of the expanded codes of a row, DEEP of them */
    /* Some columns and features of the values as panels, DEEP * 4 * WIDE bytes each. */
    void (*pack)(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep, uint8_t *out);
    /* Codes of some rows and features, zeros for missing ones up to `tall` rows and the next unit of features. */
    void (*expand)(const product *p, int64_t row, int64_t count, int64_t tall, int64_t start, int64_t deep, void *out);
    /* out (+)= rows from `row` on of expanded codes times a panel; `depth` is a multiple of the unit. */
    void (*tile)(const void *codes, int64_t row, const uint8_t *panel, int64_t depth, int planes, int add,
                 int32_t *out, int64_t stride);
    /* Without tiles: values (columns, depth) int32 -> sums (columns, rows); `memory` has room for the values again. */
    void (*direct)(const product *p, const int32_t *values, int32_t *memory, int32_t *sums);
    void (*begin)(void); /* of a call, in its thread */
    void (*end)(void);
} kernel;

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

INLINE int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* ---- Codes ----------------------------------------------------------------------------------------------------- */

#if defined(X86)
/* Transposes sixteen rows of sixteen bytes. */
INLINE void transpose_bytes(const int8_t *from, int64_t stride, __m128i *m) {
    __m128i a[16];
    for (int i = 0; i < 16; i++)
        m[i] = _mm_loadu_si128((const __m128i *)(from + i * stride));
    /* Four times the same perfect shuffle of rows i and i + 8. */
    for (int step = 0; step < 4; step++) {
        for (int i = 0; i < 8; i++) {
            a[2 * i] = _mm_unpacklo_epi8(m[i], m[i + 8]);
            a[2 * i + 1] = _mm_unpackhi_epi8(m[i], m[i + 8]);
        }
        memcpy(m, a, sizeof a);
    }
}
#endif

/* Rows of DEEP int8 codes. */
static void expand_bytes(const product *p, int64_t row, int64_t count, int64_t tall, int64_t start, int64_t deep,
                         void *memory) {
    const int8_t *from = p->codes + row * p->row_stride + start * p->code_stride;
    int8_t *out = memory;
    if (count < tall || deep < DEEP)
        memset(out, 0, (size_t)tall * DEEP);
    if (p->code_stride == 1) {
        for (int64_t r = 0; r < count; r++)
            memcpy(out + r * DEEP, from + r * p->row_stride, (size_t)deep);
        return;
    }
    for (int64_t r = 0; r < count; r += 16)
        for (int64_t k = 0; k < deep; k += 16) {
            const int8_t *block = from + r * p->row_stride + k * p->code_stride;
            int8_t *to = out + r * DEEP + k;
            int64_t height = count - r < 16 ? count - r : 16, width = deep - k < 16 ? deep - k : 16;
#if defined(X86)
            if (p->row_stride == 1 && height == 16 && width == 16) {
                __m128i m[16];
                transpose_bytes(block, p->code_stride, m);
                for (int i = 0; i < 16; i++)
                    _mm_store_si128((__m128i *)(to + i * DEEP), m[i]);
                continue;
            }
#endif
            for (int64_t j = 0; j < width; j++)
                for (int64_t i = 0; i < height; i++)
                    to[i * DEEP + j] = block[i * p->row_stride + j * p->code_stride];
        }
}

/* ---- Values as bytes ------------------------------------------------------------------------------------------- */

/* Panels (plane, four features, column, 4), missing values zero; every byte is changed by `flip`. */
INLINE void pack_planes(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep, int unit,
                        uint8_t flip, uint8_t *out) {
    for (int64_t k = 0; k < up(deep, unit); k += 4)
        for (int plane = 0; plane < p->planes; plane++) {
            const uint8_t *from = p->values + (start + k) * p->value_stride + plane * p->plane_stride + first;
            for (int64_t c = 0; c < width; c += WIDE) {
                uint8_t *to = out + (c * 4 + plane * WIDE) * DEEP + k * WIDE;
#if defined(X86)
                if (k + 4 <= deep && c + WIDE <= width) {
                    __m128i m[4], by = _mm_set1_epi8((char)flip);
                    for (int i = 0; i < 4; i++)
                        m[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + i * p->value_stride + c)), by);
                    __m128i a = _mm_unpacklo_epi8(m[0], m[1]), b = _mm_unpacklo_epi8(m[2], m[3]);
                    __m128i d = _mm_unpackhi_epi8(m[0], m[1]), e = _mm_unpackhi_epi8(m[2], m[3]);
                    _mm_store_si128((__m128i *)to, _mm_unpacklo_epi16(a, b));
                    _mm_store_si128((__m128i *)to + 1, _mm_unpackhi_epi16(a, b));
                    _mm_store_si128((__m128i *)to + 2, _mm_unpacklo_epi16(d, e));
                    _mm_store_si128((__m128i *)to + 3, _mm_unpackhi_epi16(d, e));
                    continue;
                }
#endif
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < WIDE; i++)
                        to[4 * i + j] =
                            flip ^ (c + i < width && k + j < deep ? from[j * p->value_stride + c + i] : 0);
            }
        }
}

static void pack_bytes(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep, uint8_t *out) {
    pack_planes(p, first, width, start, deep, 4, 0, out);
}

/* ---- Any processor --------------------------------------------------------------------------------------------- */

#define PORTABLE_ROWS 4

CLONES static void portable_tile(const void *codes, int64_t row, const uint8_t *panel, int64_t depth, int planes,
                                 int add, int32_t *out, int64_t stride) {
    const int8_t *w = (const int8_t *)codes + row * DEEP;
    for (int r = 0; r < PORTABLE_ROWS; r++, w += DEEP, out += stride) {
        uint32_t total[WIDE] = {0};
        if (add)
            memcpy(total, out, sizeof total);
        for (int plane = 0; plane < planes; plane++) {
            const uint8_t *x = panel + plane * WIDE * DEEP;
            int32_t part[4 * WIDE] = {0};
            for (int64_t k = 0; k < depth; k += 4, x += 4 * WIDE) {
                int16_t four[4] = {w[k], w[k + 1], w[k + 2], w[k + 3]}, all[4 * WIDE];
                for (int i = 0; i < WIDE; i++)
                    memcpy(all + 4 * i, four, sizeof four);
                for (int i = 0; i < 4 * WIDE; i++)
                    part[i] += all[i] * (int16_t)x[i];
            }
            for (int c = 0; c < WIDE; c++)
                for (int j = 0; j < 4; j++)
                    total[c] += (uint32_t)part[4 * c + j] << (8 * plane);
        }
        memcpy(out, total, sizeof total);
    }
}

/* ---- AVX2 ------------------------------------------------------------------------------------------------------ */

#if defined(X86)
/* Without byte dot products the best are sixteen products of 16 bits, or thirty-two of 7 bits with 8, in one
 * instruction, each with an addition. A value of 24 bits is a signed low limb of 16 bits, seven bits above it, of whose
 * products only the lowest byte counts, and a top bit, of whose products only the parity counts: and and exclusive or
 * of 32 features at once. That is three quarters of the instructions for two limbs of 16 bits, which 32 bits need.
 *
 * Codes of a block: TALL rows of DEEP int16, of DEEP int8, and of DEEP parities, a bit each.
 * Panels of 24 bits: (pair of features, column, 2) int16 low limbs; (four features, column, 4) bytes of seven bits;
 * (32 features, column) words of top bits. Panels of 32 bits: (pair of features, limb, column, 2) int16. */
#define AVX2_ROWS 3
#define AVX2_UNIT 4
#define AVX2_BYTES (TALL * DEEP * 2)
#define AVX2_BITS (TALL * DEEP * 3)
#define AVX2_ROW_BYTES (3 * DEEP + DEEP / 8)

/* The bits `mask` of 32 bytes, four bytes at a time into a word; bit b of byte i comes from byte 4 (7 - b) + i. */
TARGET("avx2") INLINE __m256i gather_bits(__m256i v, int mask) {
    __m256i by = mask == 1 ? _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0) : _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    v = _mm256_and_si256(v, _mm256_set1_epi8((char)mask));
    v = mask == 1 ? _mm256_sllv_epi32(v, by) : _mm256_srlv_epi32(v, by);
    v = _mm256_or_si256(v, _mm256_permute4x64_epi64(v, 0x4E));
    v = _mm256_or_si256(v, _mm256_shuffle_epi32(v, 0x4E));
    return _mm256_or_si256(v, _mm256_shuffle_epi32(v, 0xB1));
}

TARGET("avx2") static void avx2_expand(const product *p, int64_t row, int64_t count, int64_t tall, int64_t start,
                                       int64_t deep, void *out) {
    char *same = (char *)out + AVX2_BYTES, *wide = out, *bits = (char *)out + AVX2_BITS;
    expand_bytes(p, row, count, tall, start, deep, same);
    for (int64_t r = 0; r < tall; r++)
        for (int64_t k = 0; k < deep; k += 32) {
            __m256i v = _mm256_load_si256((const __m256i *)(same + r * DEEP + k));
            __m256i *to = (__m256i *)(wide + 2 * (r * DEEP + k));
            _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)));
            _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1)));
            if (p->planes == 3) {
                int32_t word = _mm256_cvtsi256_si32(gather_bits(v, 1));
                memcpy(bits + (r * DEEP + k) / 8, &word, 4);
            }
        }
}

/* Limbs of sixteen values; the low one is signed, so the high one takes its carry. */
TARGET("avx2") INLINE void limbs(const uint8_t *from, int64_t stride, int planes, int64_t width, __m256i *low,
                                 __m256i *high) {
    __m128i b[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (int i = 0; i < planes; i++)
        if (width >= WIDE)
            b[i] = _mm_loadu_si128((const __m128i *)(from + i * stride));
        else if (width > 0)
            memcpy(b + i, from + i * stride, (size_t)width);
    *low = _mm256_or_si256(_mm256_cvtepu8_epi16(b[0]), _mm256_slli_epi16(_mm256_cvtepu8_epi16(b[1]), 8));
    *high = _mm256_or_si256(_mm256_cvtepu8_epi16(b[2]), _mm256_slli_epi16(_mm256_cvtepu8_epi16(b[3]), 8));
    *high = _mm256_sub_epi16(*high, _mm256_srai_epi16(*low, 15));
}

/* Two rows of sixteen int16 side by side: the lower and the upper eight columns. */
TARGET("avx2") INLINE void beside(__m256i a, __m256i b, __m256i *first, __m256i *second) {
    __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    *first = _mm256_permute2x128_si256(low, high, 0x20);
    *second = _mm256_permute2x128_si256(low, high, 0x31);
}

#define PANEL_SEVENS (DEEP * WIDE * 2)
#define PANEL_BITS (DEEP * WIDE * 3)

/* Thirty-two features of at most sixteen columns, `k` the first of them. */
TARGET("avx2") INLINE void avx2_panel(const product *p, const uint8_t *from, int64_t width, int64_t k, int64_t deep,
                                      int planes, uint8_t *out) {
    const __m256i seven = _mm256_set1_epi8(0x7F), top = _mm256_set1_epi8((char)0x80);
    __m256i bits0 = _mm256_setzero_si256(), bits1 = bits0;
        for (int j = 0; j < 8 && k + 4 * j < deep; j++) {
            __m256i low[4], high[4], x[2], y[2];
            for (int i = 0; i < 4; i++)
                limbs(from + (k + 4 * j + i) * p->value_stride, p->plane_stride, planes,
                      k + 4 * j + i < deep ? width : 0, low + i, high + i);
            __m256i *to = (__m256i *)(out + (k + 4 * j) * WIDE * (planes == 3 ? 2 : 4));
            beside(low[0], low[1], x, y);
            beside(low[2], low[3], x + 1, y + 1);
            if (planes == 4) {
                __m256i u[2], v[2];
                beside(high[0], high[1], u, v);
                beside(high[2], high[3], u + 1, v + 1);
                for (int i = 0; i < 2; i++) {
                    _mm256_store_si256(to + 4 * i, x[i]);
                    _mm256_store_si256(to + 4 * i + 1, y[i]);
                    _mm256_store_si256(to + 4 * i + 2, u[i]);
                    _mm256_store_si256(to + 4 * i + 3, v[i]);
                }
                continue;
            }
            for (int i = 0; i < 2; i++) {
                _mm256_store_si256(to + 2 * i, x[i]);
                _mm256_store_si256(to + 2 * i + 1, y[i]);
            }
            /* The low bytes of four rows side by side. */
            const __m256i byte = _mm256_set1_epi16(0xFF);
            __m256i even = _mm256_or_si256(_mm256_and_si256(high[0], byte), _mm256_slli_epi16(high[1], 8));
            __m256i odd = _mm256_or_si256(_mm256_and_si256(high[2], byte), _mm256_slli_epi16(high[3], 8));
            beside(even, odd, x, y);
            to = (__m256i *)(out + PANEL_SEVENS + (k + 4 * j) * WIDE);
            _mm256_store_si256(to, _mm256_and_si256(x[0], seven));
            _mm256_store_si256(to + 1, _mm256_and_si256(y[0], seven));
            bits0 = _mm256_or_si256(bits0, _mm256_srli_epi32(_mm256_and_si256(x[0], top), j));
            bits1 = _mm256_or_si256(bits1, _mm256_srli_epi32(_mm256_and_si256(y[0], top), j));
        }
    if (planes == 3) {
        _mm256_store_si256((__m256i *)(out + PANEL_BITS + k * WIDE / 8), bits0);
        _mm256_store_si256((__m256i *)(out + PANEL_BITS + k * WIDE / 8) + 1, bits1);
    }
}

TARGET("avx2") static void avx2_pack(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep,
                                     uint8_t *out) {
    const uint8_t *from = p->values + start * p->value_stride + first;
    for (int64_t k = 0; k < deep; k += 32)
        for (int64_t c = 0; c < width; c += WIDE)
            if (p->planes == 3)
                avx2_panel(p, from + c, width - c, k, deep, 3, out + c * 4 * DEEP);
            else
                avx2_panel(p, from + c, width - c, k, deep, 4, out + c * 4 * DEEP);
}

/* Adds the products of three rows' codes and two vectors of values to the sums of a name. In assembly, since compilers
 * put sums into memory. */
#define AVX2_PART(name, multiply, add, at, stride, values)                                                             \
    __asm__("vmovdqa %[v0], %[x]\n\t"                                                                                  \
            "vmovdqa %[v1], %[y]\n\t"                                                                                  \
            "vpbroadcastd %[w0], %[w]\n\t" multiply " %[w], %[x], %[t]\n\t" add " %[t], %[s00], %[s00]\n\t" multiply   \
            " %[w], %[y], %[w]\n\t" add " %[w], %[s01], %[s01]\n\t"                                                    \
            "vpbroadcastd %[w1], %[w]\n\t" multiply " %[w], %[x], %[t]\n\t" add " %[t], %[s10], %[s10]\n\t" multiply   \
            " %[w], %[y], %[w]\n\t" add " %[w], %[s11], %[s11]\n\t"                                                    \
            "vpbroadcastd %[w2], %[w]\n\t" multiply " %[w], %[x], %[x]\n\t" add " %[x], %[s20], %[s20]\n\t" multiply   \
            " %[w], %[y], %[y]\n\t" add " %[y], %[s21], %[s21]"                                                        \
            : [s00] "+x"(name##00), [s01] "+x"(name##01), [s10] "+x"(name##10), [s11] "+x"(name##11),                  \
              [s20] "+x"(name##20), [s21] "+x"(name##21), [w] "=&x"(w), [t] "=&x"(t), [x] "=&x"(x), [y] "=&x"(y)       \
            : [w0] "m"(*(const int32_t *)(at)), [w1] "m"(*(const int32_t *)((at) + (stride))),                         \
              [w2] "m"(*(const int32_t *)((at) + 2 * (stride))), [v0] "m"(*(const __m256i *)(values)),                 \
              [v1] "m"(*(const __m256i *)((values) + 32)))

#define AVX2_SUMS(name) name##00 = zero, name##01 = zero, name##10 = zero, name##11 = zero, name##20 = zero, name##21 = zero

/* The parity of each word, times 2^23. */
TARGET("avx2") INLINE __m256i parity(__m256i v) {
    v = _mm256_xor_si256(v, _mm256_slli_epi32(v, 16));
    v = _mm256_xor_si256(v, _mm256_slli_epi32(v, 8));
    v = _mm256_xor_si256(v, _mm256_slli_epi32(v, 4));
    v = _mm256_xor_si256(v, _mm256_slli_epi32(v, 2));
    v = _mm256_xor_si256(v, _mm256_slli_epi32(v, 1));
    return _mm256_slli_epi32(_mm256_srli_epi32(v, 31), 23);
}

/* Writes the sum to a column half of a row, or adds it. */
#define AVX2_PUT(r, half, sum)                                                                                         \
    do {                                                                                                               \
        __m256i *to = (__m256i *)(out + (r) * stride) + (half), all = (sum);                                           \
        _mm256_storeu_si256(to, add ? _mm256_add_epi32(all, _mm256_loadu_si256(to)) : all);                            \
    } while (0)
#define AVX2_EACH(put) put(0, 0), put(0, 1), put(1, 0), put(1, 1), put(2, 0), put(2, 1)

TARGET("avx2") static void avx2_tile(const void *codes, int64_t row, const uint8_t *panel, int64_t depth, int planes,
                                     int add, int32_t *out, int64_t stride) {
    const char *wide = (const char *)codes + row * DEEP * 2, *same = (const char *)codes + AVX2_BYTES + row * DEEP;
    const char *parities = (const char *)codes + AVX2_BITS + row * DEEP / 8;
    const uint8_t *sevens = panel + PANEL_SEVENS, *bits = panel + PANEL_BITS;
    const __m256i zero = _mm256_setzero_si256();
    __m256i AVX2_SUMS(low), AVX2_SUMS(high), w, t, x, y;
    if (planes == 4) {
        for (int64_t k = 0; k < depth; k += 2, wide += 4, panel += 128) {
            AVX2_PART(low, "vpmaddwd", "vpaddd", wide, 2 * DEEP, panel);
            AVX2_PART(high, "vpmaddwd", "vpaddd", wide, 2 * DEEP, panel + 64);
        }
#define SUM(r, h) low##r##h = _mm256_add_epi32(low##r##h, _mm256_slli_epi32(high##r##h, 16))
        AVX2_EACH(SUM);
#undef SUM
    } else {
        for (int64_t k = 0; k < depth; k += 4, wide += 8, same += 4, panel += 128, sevens += 64) {
            AVX2_PART(low, "vpmaddwd", "vpaddd", wide, 2 * DEEP, panel);
            AVX2_PART(low, "vpmaddwd", "vpaddd", wide + 4, 2 * DEEP, panel + 64);
            AVX2_PART(high, "vpmaddubsw", "vpaddw", same, DEEP, sevens);
        }
        /* Both 16-bit sums of a column come to the top half. */
        const __m256i upper = _mm256_set1_epi32((int32_t)0xFFFF0000);
#define SUM(r, h)                                                                                                      \
    low##r##h = _mm256_add_epi32(_mm256_add_epi32(low##r##h, _mm256_slli_epi32(high##r##h, 16)),                       \
                                 _mm256_and_si256(high##r##h, upper))
        AVX2_EACH(SUM);
#undef SUM
        __m256i AVX2_SUMS(odd);
        for (int64_t k = 0; k < depth; k += 32, parities += 4, bits += 64)
            AVX2_PART(odd, "vpand", "vpxor", parities, DEEP / 8, bits);
#define SUM(r, h) low##r##h = _mm256_add_epi32(low##r##h, parity(odd##r##h))
        AVX2_EACH(SUM);
#undef SUM
    }
    AVX2_PUT(0, 0, low00);
    AVX2_PUT(0, 1, low01);
    AVX2_PUT(1, 0, low10);
    AVX2_PUT(1, 1, low11);
    AVX2_PUT(2, 0, low20);
    AVX2_PUT(2, 1, low21);
}
#endif

/* ---- Dot products of four bytes --------------------------------------------------------------------------------- */

/* Kernels whose instruction adds the products of four bytes to a sum of 32 bits: of unsigned values and signed codes on
 * x86, of signed ones on Arm. Each instruction stands in one macro, in assembly: with intrinsics, compilers put sums
 * into memory. */
typedef uint32_t vec4 __attribute__((vector_size(16)));
typedef uint32_t vec8 __attribute__((vector_size(32)));
typedef uint32_t vec16 __attribute__((vector_size(64)));

#if defined(CT_EMULATE)
INLINE void dot_bytes(void *memory, const void *values, const void *codes, int lanes, int is_signed) {
    uint32_t *sums = memory;
    const uint8_t *x = values;
    const int8_t *w = codes;
    for (int i = 0; i < 4 * lanes; i++)
        sums[i / 4] += (uint32_t)((is_signed ? (int8_t)x[i] : x[i]) * w[i]);
}
#define DOT4(s, x, w) dot_bytes(&(s), &(x), &(w), 4, 1)
#define DOT8(s, x, w) dot_bytes(&(s), &(x), &(w), 8, 0)
#define DOT16(s, x, w) dot_bytes(&(s), &(x), &(w), 16, 0)
#else
#define DOT4(s, x, w) __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(s) : "w"(x), "w"(w))
#define DOT8(s, x, w) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s) : "x"(x), "x"(w))
#define DOT16(s, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(x), "v"(w))
#endif

/* A tile of `height` rows and sixteen columns, as many columns at a time as `parts` vectors have; `extra` rows' sums are
 * added. */
#define DOT_TILE(vec, DOT, parts, height, planes, extra)                                                               \
    do {                                                                                                               \
        const int lanes = (int)(sizeof(vec) / sizeof(uint32_t));                                                       \
        for (int at = 0; at < WIDE; at += lanes * (parts)) {                                                           \
            vec s[height][planes][parts] = {{{{0}}}};                                                                  \
            const uint8_t *x = panel + 4 * at;                                                                         \
            for (int64_t k = 0; k < depth; k += 4, x += 4 * WIDE) {                                                    \
                vec v[planes][parts];                                                                                  \
                _Pragma("GCC unroll 8") for (int p = 0; p < (planes); p++)                                             \
                    _Pragma("GCC unroll 8") for (int j = 0; j < (parts); j++)                                          \
                        v[p][j] = *(const vec *)(x + p * WIDE * DEEP + 4 * j * lanes);                                 \
                _Pragma("GCC unroll 8") for (int r = 0; r < (height); r++) {                                           \
                    uint32_t four;                                                                                     \
                    memcpy(&four, codes + r * DEEP + k, 4);                                                            \
                    vec w = four - (vec){0};                                                                           \
                    _Pragma("GCC unroll 8") for (int p = 0; p < (planes); p++)                                         \
                        _Pragma("GCC unroll 8") for (int j = 0; j < (parts); j++) DOT(s[r][p][j], v[p][j], w);         \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("GCC unroll 8") for (int r = 0; r < (height); r++)                                                 \
                _Pragma("GCC unroll 8") for (int j = 0; j < (parts); j++) {                                            \
                    vec all = s[r][0][j] + (extra), old;                                                               \
                    _Pragma("GCC unroll 8") for (int p = 1; p < (planes); p++) all += s[r][p][j] << (8 * p);           \
                    int32_t *to = out + r * stride + at + j * lanes;                                                   \
                    if (add) {                                                                                         \
                        memcpy(&old, to, sizeof old);                                                                  \
                        all += old;                                                                                    \
                    }                                                                                                  \
                    memcpy(to, &all, sizeof all);                                                                      \
                }                                                                                                      \
        }                                                                                                              \
    } while (0)

#if defined(X86)
LATER("avx512f,avx512vnni") static void avx512_tile(const void *memory, int64_t row, const uint8_t *panel, int64_t depth,
                                          int planes, int add, int32_t *out, int64_t stride) {
    const int8_t *codes = (const int8_t *)memory + row * DEEP;
    if (planes == 3)
        DOT_TILE(vec16, DOT16, 1, 8, 3, 0);
    else
        DOT_TILE(vec16, DOT16, 1, 6, 4, 0);
}
#endif

#if defined(X86_NEW)
LATER("avx2,avxvnni") static void avx_tile(const void *memory, int64_t row, const uint8_t *panel, int64_t depth, int planes,
                                    int add, int32_t *out, int64_t stride) {
    const int8_t *codes = (const int8_t *)memory + row * DEEP;
    if (planes == 3)
        DOT_TILE(vec8, DOT8, 1, 4, 3, 0);
    else
        DOT_TILE(vec8, DOT8, 1, 3, 4, 0);
}
#endif

#if defined(ARM) || defined(CT_EMULATE)
static void pack_signed(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep, uint8_t *out) {
    pack_planes(p, first, width, start, deep, 4, 0x80, out);
}

/* What a row's sum lacks since its values are 128 too small. */
INLINE uint32_t less(const int8_t *codes, int64_t depth, int planes) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; k++)
        sum += codes[k];
    return ((uint32_t)sum << 7) * (planes == 3 ? 0x010101u : 0x01010101u);
}

/* The extension by itself means Armv8.2 to clang; gcc's assembler has to hear of it. */
#if defined(ARM) && !defined(CT_EMULATE) && defined(__clang__)
TARGET("dotprod")
#elif defined(ARM) && !defined(CT_EMULATE)
TARGET("arch=armv8.2-a+dotprod")
#endif
static void neon_tile(const void *memory, int64_t row, const uint8_t *panel, int64_t depth, int planes, int add,
                      int32_t *out, int64_t stride) {
    const int8_t *codes = (const int8_t *)memory + row * DEEP;
    if (planes == 3) {
        uint32_t lacks[4];
        for (int r = 0; r < 4; r++)
            lacks[r] = less(codes + r * DEEP, depth, 3);
        DOT_TILE(vec4, DOT4, 2, 4, 3, lacks[r]);
    } else {
        uint32_t lacks[3];
        for (int r = 0; r < 3; r++)
            lacks[r] = less(codes + r * DEEP, depth, 4);
        DOT_TILE(vec4, DOT4, 2, 3, 4, lacks[r]);
    }
}
#endif

/* ---- AMX ------------------------------------------------------------------------------------------------------- */

#if defined(X86_NEW)
#if defined(CT_EMULATE)
static int8_t emulated[8][16][64];
static void load_tile(int tile, const void *from, int64_t stride) {
    for (int r = 0; r < 16; r++)
        memcpy(emulated[tile][r], (const char *)from + r * stride, 64);
}
static void store_tile(int tile, void *to) { memcpy(to, emulated[tile], sizeof emulated[tile]); }
static void zero_tile(int tile) { memset(emulated[tile], 0, sizeof emulated[tile]); }
static void dot_tiles(int sums, int codes, int values) {
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 16; c++)
                for (int j = 0; j < 4; j++) {
                    int32_t sum;
                    memcpy(&sum, &emulated[sums][r][4 * c], 4);
                    sum += emulated[codes][r][4 * k + j] * (uint8_t)emulated[values][k][4 * c + j];
                    memcpy(&emulated[sums][r][4 * c], &sum, 4);
                }
}
static void amx_begin(void) {}
static void amx_end(void) {}
#define LOAD_TILE(tile, from, stride) load_tile(tile, from, stride)
#define STORE_TILE(tile, to) store_tile(tile, to)
#define ZERO_TILE(tile) zero_tile(tile)
#define DOT_TILES(sums, codes, values) dot_tiles(sums, codes, values)
#else
#define LOAD_TILE(tile, from, stride)                                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE_TILE(tile, to)                                                                                           \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)64) : "memory")
#define ZERO_TILE(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
/* Signed codes times unsigned values. */
#define DOT_TILES(sums, codes, values)                                                                                 \
    __asm__ volatile("tdpbsud %%tmm" #values ", %%tmm" #codes ", %%tmm" #sums ::)
TARGET("amx-tile") static void amx_begin(void) {
    _Alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = 64;
        shape.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}
TARGET("amx-tile") static void amx_end(void) { __asm__ volatile("tilerelease" ::); }
#endif

static void pack_tiles(const product *p, int64_t first, int64_t width, int64_t start, int64_t deep, uint8_t *out) {
    pack_planes(p, first, width, start, deep, 64, 0, out);
}

/* Planes put together: sums (planes, 16, 16). */
LATER("avx512f") INLINE void put_tiles(const int32_t *sums, int planes, int add, int32_t *out, int64_t stride) {
    for (int r = 0; r < 16; r++) {
        vec16 all = *(const vec16 *)(sums + 16 * r), old;
        for (int p = 1; p < planes; p++)
            all += *(const vec16 *)(sums + 256 * p + 16 * r) << (8 * p);
        if (add) {
            memcpy(&old, out + r * stride, sizeof old);
            all += old;
        }
        memcpy(out + r * stride, &all, sizeof all);
    }
}

/* Codes are the left operand, whose rows lie DEEP apart, a panel's planes the right ones; the eight tile registers hold
 * sums of 32 rows and three planes or of 16 rows and four planes, some codes and some values. */
LATER("avx512f,amx-tile,amx-int8") static void amx_tile(const void *memory, int64_t row, const uint8_t *panel, int64_t depth, int planes,
                                       int add, int32_t *out, int64_t stride) {
    const int8_t *codes = (const int8_t *)memory + row * DEEP;
    _Alignas(64) int32_t sums[6 * 256];
    ZERO_TILE(0);
    ZERO_TILE(1);
    ZERO_TILE(2);
    ZERO_TILE(3);
    if (planes == 4) {
        for (int64_t k = 0; k < depth; k += 64) {
            const uint8_t *x = panel + k * WIDE;
            LOAD_TILE(6, codes + k, DEEP);
            LOAD_TILE(7, x, 64);
            DOT_TILES(0, 6, 7);
            LOAD_TILE(5, x + WIDE * DEEP, 64);
            DOT_TILES(1, 6, 5);
            LOAD_TILE(7, x + 2 * WIDE * DEEP, 64);
            DOT_TILES(2, 6, 7);
            LOAD_TILE(5, x + 3 * WIDE * DEEP, 64);
            DOT_TILES(3, 6, 5);
        }
        STORE_TILE(0, sums);
        STORE_TILE(1, sums + 256);
        STORE_TILE(2, sums + 512);
        STORE_TILE(3, sums + 768);
        put_tiles(sums, 4, add, out, stride);
        return;
    }
    ZERO_TILE(4);
    ZERO_TILE(5);
    for (int64_t k = 0; k < depth; k += 64) {
        const uint8_t *x = panel + k * WIDE;
        LOAD_TILE(6, codes + k, DEEP);
        LOAD_TILE(7, x, 64);
        DOT_TILES(0, 6, 7);
        LOAD_TILE(7, x + WIDE * DEEP, 64);
        DOT_TILES(1, 6, 7);
        LOAD_TILE(7, x + 2 * WIDE * DEEP, 64);
        DOT_TILES(2, 6, 7);
        LOAD_TILE(6, codes + 16 * DEEP + k, DEEP);
        DOT_TILES(5, 6, 7);
        LOAD_TILE(7, x, 64);
        DOT_TILES(3, 6, 7);
        LOAD_TILE(7, x + WIDE * DEEP, 64);
        DOT_TILES(4, 6, 7);
    }
    STORE_TILE(0, sums);
    STORE_TILE(1, sums + 256);
    STORE_TILE(2, sums + 512);
    STORE_TILE(3, sums + 768);
    STORE_TILE(4, sums + 1024);
    STORE_TILE(5, sums + 1280);
    put_tiles(sums, 3, add, out, stride);
    put_tiles(sums + 768, 3, add, out + 16 * stride, stride);
}
#endif

/* ---- Few columns ----------------------------------------------------------------------------------------------- */

/* Each code is read once, as it lies, and sums mod 2^32 are made of whole values: codes are read from memory faster than
 * tiles with mostly empty columns could multiply. */
CLONES static void portable_direct(const product *p, const int32_t *values, int32_t *memory, int32_t *sums) {
    uint32_t *all = (uint32_t *)sums;
    (void)memory;
    if (p->code_stride == 1) {
        for (int64_t r = 0; r < p->rows; r++)
            for (int64_t c = 0; c < p->columns; c++) {
                const int8_t *w = p->codes + r * p->row_stride;
                const int32_t *x = values + c * p->depth;
                uint32_t sum = 0;
                for (int64_t k = 0; k < p->depth; k++)
                    sum += (uint32_t)w[k] * (uint32_t)x[k];
                all[c * p->rows + r] = sum;
            }
        return;
    }
    memset(sums, 0, (size_t)(p->rows * p->columns) * sizeof *sums);
    for (int64_t k = 0; k < p->depth; k++)
        for (int64_t c = 0; c < p->columns; c++) {
            const int8_t *w = p->codes + k * p->code_stride;
            uint32_t x = (uint32_t)values[c * p->depth + k], *to = all + c * p->rows;
            for (int64_t r = 0; r < p->rows; r++)
                to[r] += (uint32_t)w[r * p->row_stride] * x;
        }
}

#if defined(X86)
/* Limbs of the values, and the products by pairs of features, as the tiles of AVX2 have them. */
INLINE int32_t low_pair(int32_t a, int32_t b) { return (int32_t)(((uint32_t)a & 0xFFFF) | (uint32_t)b << 16); }
INLINE int32_t high_pair(int32_t a, int32_t b) {
    return (int32_t)(((uint32_t)a + 0x8000) >> 16 | (((uint32_t)b + 0x8000) & 0xFFFF0000));
}

TARGET("avx2") INLINE int32_t total_of(__m256i low, __m256i high) {
    __m256i v = _mm256_add_epi32(low, _mm256_slli_epi32(high, 16));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

#define AHEAD 4 /* rows that are fetched before they are needed */

/* Some rows, the codes of each side by side, times some columns of (limb, depth) int16, `apart` from each other. */
TARGET("avx2") INLINE void rows_direct(const product *p, int64_t row, int rows, const int16_t *x, int64_t apart,
                                       int64_t column, int columns, int32_t *sums) {
    __m256i low[4][2], high[4][2];
    int64_t whole = p->depth / 16 * 16;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            low[r][c] = high[r][c] = _mm256_setzero_si256();
    x += 2 * column * apart;
    const int8_t *w = p->codes + row * p->row_stride;
    for (int64_t k = 0; k < whole; k += 16)
        for (int r = 0; r < rows; r++) {
            __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + r * p->row_stride + k)));
            _mm_prefetch((const char *)w + (AHEAD + r) * p->row_stride + k, _MM_HINT_T0);
            for (int c = 0; c < columns; c++) {
                const int16_t *at = x + 2 * c * apart + k;
                low[r][c] = _mm256_add_epi32(low[r][c], _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i *)at)));
                at += apart;
                high[r][c] =
                    _mm256_add_epi32(high[r][c], _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i *)at)));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            uint32_t sum = (uint32_t)total_of(low[r][c], high[r][c]);
            for (int64_t k = whole; k < p->depth; k++) {
                const int16_t *at = x + 2 * c * apart + k;
                sum += (uint32_t)(w[r * p->row_stride + k] * at[0]) + ((uint32_t)(w[r * p->row_stride + k] * at[apart]) << 16);
            }
            sums[(column + c) * p->rows + row + r] = (int32_t)sum;
        }
}

#define STRIP 32 /* rows, whose codes lie side by side */
#define PAIRS 8  /* of features that are read together: so many streams processors can read ahead */

/* Rows, eight for each of `vectors`, times some columns, for `pairs` pairs of features of x (pair, column, limb). */
TARGET("avx2") INLINE void strip_direct(const product *p, int64_t row, int vectors, int64_t k, int64_t pairs,
                                        const int32_t *x, int64_t column, int columns, int32_t *sums) {
    __m256i low[2][4], high[2][4];
    for (int c = 0; c < columns; c++)
        for (int v = 0; v < vectors; v++)
            low[c][v] = high[c][v] = _mm256_setzero_si256();
    for (int64_t i = 0; i < pairs; i++) {
        const int8_t *even = p->codes + (k + 2 * i) * p->code_stride + row;
        const int8_t *odd = k + 2 * i + 1 < p->depth ? even + p->code_stride : even;
        const int32_t *two = x + 2 * (i * p->columns + column);
        for (int v = 0; v < vectors; v += 2) {
            __m128i a = _mm_loadu_si128((const __m128i *)(even + 8 * v));
            __m128i b = _mm_loadu_si128((const __m128i *)(odd + 8 * v));
            __m256i first = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
            __m256i second = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
            for (int c = 0; c < columns; c++) {
                __m256i l = _mm256_set1_epi32(two[2 * c]), h = _mm256_set1_epi32(two[2 * c + 1]);
                low[c][v] = _mm256_add_epi32(low[c][v], _mm256_madd_epi16(first, l));
                low[c][v + 1] = _mm256_add_epi32(low[c][v + 1], _mm256_madd_epi16(second, l));
                high[c][v] = _mm256_add_epi32(high[c][v], _mm256_madd_epi16(first, h));
                high[c][v + 1] = _mm256_add_epi32(high[c][v + 1], _mm256_madd_epi16(second, h));
            }
        }
    }
    for (int c = 0; c < columns; c++)
        for (int v = 0; v < vectors; v++) {
            __m256i *to = (__m256i *)(sums + (column + c) * p->rows + row) + v;
            __m256i all = _mm256_add_epi32(low[c][v], _mm256_slli_epi32(high[c][v], 16));
            _mm256_storeu_si256(to, k ? _mm256_add_epi32(all, _mm256_loadu_si256(to)) : all);
        }
}

TARGET("avx2") static void avx2_direct(const product *p, const int32_t *values, int32_t *memory, int32_t *sums) {
    int64_t pairs = (p->depth + 1) / 2, apart = 2 * pairs;
    if (p->code_stride == 1) {
        int16_t *x = (int16_t *)memory;
        for (int64_t c = 0; c < p->columns; c++)
            for (int64_t k = 0; k < p->depth; k++) {
                int32_t v = values[c * p->depth + k];
                x[2 * c * apart + k] = (int16_t)v;
                x[(2 * c + 1) * apart + k] = (int16_t)(((uint32_t)v + 0x8000) >> 16);
            }
        int64_t row = 0;
        for (; row + 4 <= p->rows; row += 4) {
            int64_t c = 0;
            for (; c + 2 <= p->columns; c += 2) {
                rows_direct(p, row, 2, x, apart, c, 2, sums);
                rows_direct(p, row + 2, 2, x, apart, c, 2, sums);
            }
            if (c < p->columns)
                rows_direct(p, row, 4, x, apart, c, 1, sums);
        }
        for (; row < p->rows; row++)
            for (int64_t c = 0; c < p->columns; c++)
                rows_direct(p, row, 1, x, apart, c, 1, sums);
        return;
    }
    for (int64_t i = 0; i < pairs; i++)
        for (int64_t c = 0; c < p->columns; c++) {
            const int32_t *v = values + c * p->depth + 2 * i;
            int32_t other = 2 * i + 1 < p->depth ? v[1] : 0, *to = memory + 2 * (i * p->columns + c);
            to[0] = low_pair(v[0], other);
            to[1] = high_pair(v[0], other);
        }
    int64_t whole = p->rows / STRIP * STRIP;
    for (int64_t i = 0; i < pairs; i += PAIRS) {
        int64_t some = pairs - i < PAIRS ? pairs - i : PAIRS;
        const int32_t *x = memory + 2 * i * p->columns;
        for (int64_t row = 0; row < whole; row += STRIP) {
            int64_t c = 0;
            for (; c + 2 <= p->columns; c += 2) {
                strip_direct(p, row, 2, 2 * i, some, x, c, 2, sums);
                strip_direct(p, row + 16, 2, 2 * i, some, x, c, 2, sums);
            }
            if (c < p->columns)
                strip_direct(p, row, 4, 2 * i, some, x, c, 1, sums);
        }
    }
    for (int64_t row = whole; row < p->rows; row++)
        for (int64_t c = 0; c < p->columns; c++) {
            uint32_t sum = 0;
            for (int64_t k = 0; k < p->depth; k++)
                sum += (uint32_t)p->codes[k * p->code_stride + row] * (uint32_t)values[c * p->depth + k];
            sums[c * p->rows + row] = (int32_t)sum;
        }
}
#endif

/* Values of byte planes, mod 2^32. */
CLONES static void join_planes(const product *p, int32_t *out) {
    for (int64_t k = 0; k < p->depth; k++)
        for (int64_t c = 0; c < p->columns; c++) {
            const uint8_t *from = p->values + k * p->value_stride + c;
            uint32_t v = 0;
            for (int plane = 0; plane < p->planes; plane++)
                v |= (uint32_t)from[plane * p->plane_stride] << (8 * plane);
            out[c * p->depth + k] = (int32_t)v;
        }
}

static int direct(const kernel *k, const product *p) {
    size_t values = (size_t)(p->columns * up(p->depth, 2)), sums = (size_t)(p->columns * p->rows);
    int32_t *memory = malloc((2 * values + sums) * sizeof *memory);
    if (!memory)
        return 1;
    int32_t *own = memory + 2 * values;
    join_planes(p, memory);
    k->direct(p, memory, memory + values, own);
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t c = 0; c < p->columns; c++) {
            uint32_t sum = (uint32_t)own[c * p->rows + r];
            if (p->bytes)
                for (int plane = 0; plane < p->planes; plane++)
                    p->bytes[(r * p->planes + plane) * p->bytes_stride + c] = (uint8_t)(sum >> (8 * plane));
            else {
                int32_t *to = p->total + r * p->total_stride + c;
                *to = (int32_t)((p->add ? (uint32_t)*to : 0) + sum);
            }
        }
    free(memory);
    return 0;
}

/* ---- The product ----------------------------------------------------------------------------------------------- */

/* Byte planes of values: (rows, columns) -> (rows, planes, stride), lowest plane first. */
CLONES static void store_bytes(const int32_t *values, int64_t stride, int64_t rows, int64_t columns, int64_t planes,
                               uint8_t *out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t plane = 0; plane < planes; plane++) {
            uint8_t *to = out + (row * planes + plane) * out_stride;
            const uint32_t *in = (const uint32_t *)values + row * stride;
            for (int64_t c = 0; c < columns; c++)
                to[c] = (uint8_t)(in[c] >> (8 * plane));
        }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int tiled(const kernel *k, const product *p) {
    int64_t wide = VALUES / (p->depth * 4) / WIDE * WIDE;
    wide = least(wide < 64 ? 64 : wide > 512 ? 512 : wide, up(p->columns, WIDE));
    /* Blocks of features of about the same depth: one of a few would hardly pay for its tiles. */
    int64_t layers = up(p->depth, DEEP) / DEEP, step = up((p->depth + layers - 1) / layers, 64);
    int64_t height = k->rows[p->planes - 3], panel_bytes = DEEP * 4 * WIDE, layer_bytes = DEEP * 4 * wide;
    size_t values_size = (size_t)(layers * layer_bytes);
    size_t codes_size = padded((size_t)(TALL * k->row_bytes)), own_size = padded((size_t)(TALL * wide) * 4);
    char *memory = aligned_alloc(64, values_size + codes_size + own_size);
    if (!memory)
        return 1;
    uint8_t *values = (uint8_t *)memory;
    char *codes = memory + values_size;
    int32_t *own = (int32_t *)(codes + codes_size);
    _Alignas(64) int32_t edge[MOST_ROWS * WIDE];
    if (k->begin)
        k->begin();
    for (int64_t first = 0; first < p->columns; first += wide) {
        int64_t width = least(wide, p->columns - first);
        for (int64_t start = 0; start < p->depth; start += step)
            k->pack(p, first, width, start, least(step, p->depth - start), values + start / step * layer_bytes);
        for (int64_t row = 0; row < p->rows; row += TALL) {
            int64_t count = least(TALL, p->rows - row);
            int32_t *total = p->bytes ? own : p->total + row * p->total_stride + first;
            int64_t stride = p->bytes ? wide : p->total_stride;
            for (int64_t start = 0; start < p->depth; start += step) {
                int64_t deep = least(step, p->depth - start);
                const uint8_t *panel = values + start / step * layer_bytes;
                k->expand(p, row, count, up(count, height), start, deep, codes);
                for (int64_t c = 0; c < width; c += WIDE, panel += panel_bytes)
                    for (int64_t r = 0; r < count; r += height) {
                        int32_t *to = total + r * stride + c;
                        int add = p->add || start;
                        if (r + height <= count && c + WIDE <= width) {
                            k->tile(codes, r, panel, up(deep, k->unit), p->planes, add, to, stride);
                            continue;
                        }
                        k->tile(codes, r, panel, up(deep, k->unit), p->planes, 0, edge, WIDE);
                        for (int64_t i = 0; i < least(height, count - r); i++)
                            for (int64_t j = 0; j < least(WIDE, width - c); j++)
                                to[i * stride + j] =
                                    (int32_t)((uint32_t)(add ? to[i * stride + j] : 0) + (uint32_t)edge[i * WIDE + j]);
                    }
            }
            if (p->bytes)
                store_bytes(own, wide, count, width, p->planes, p->bytes + row * p->planes * p->bytes_stride + first,
                            p->bytes_stride);
        }
    }
    if (k->end)
        k->end();
    free(memory);
    return 0;
}

/* ---- Choice ---------------------------------------------------------------------------------------------------- */

static int always(void) { return 1; }

#if defined(X86)
static unsigned leaf7(unsigned sub, int out) {
    unsigned r[4] = {0};
    __get_cpuid_count(7, sub, r, r + 1, r + 2, r + 3);
    return r[out];
}
/* Whether the operating system keeps these registers. */
static int keeps(unsigned mask) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" /* xgetbv */ : "=a"(low), "=d"(high) : "c"(0));
    return (low & mask) == mask;
}
static int has_avx2(void) { return keeps(0x6) && (leaf7(0, 1) >> 5 & 1); }
#endif

#if defined(CT_EMULATE)
#define has_avx512_vnni always
#define has_avx_vnni always
#define has_amx always
#define has_dot_products always
#elif defined(X86)
static int has_avx512_vnni(void) {
    return keeps(0xE6) && (leaf7(0, 1) >> 16 & 1) && (leaf7(0, 2) >> 11 & 1) && has_avx2();
}
#if defined(X86_NEW)
static int has_avx_vnni(void) {
    return leaf7(0, 0) >= 1 && (leaf7(1, 0) >> 4 & 1) && has_avx2();
}
static int has_amx(void) {
    if (!keeps(0x600E6) || !(leaf7(0, 3) >> 24 & 1) || !(leaf7(0, 3) >> 25 & 1) || !(leaf7(0, 1) >> 16 & 1))
        return 0;
#if defined(__linux__)
    /* ARCH_REQ_XCOMP_PERM of XTILEDATA: once for the process, or tiles raise a signal. */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}
#endif
#elif defined(ARM)
static int has_dot_products(void) {
#if defined(__APPLE__) || defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;
#else
    return 0;
#endif
}
#endif
static const kernel KERNELS[] = {
#if defined(X86_NEW)
    {"amx", has_amx, {32, 16}, 64, 4, DEEP, pack_tiles, expand_bytes, amx_tile, avx2_direct, amx_begin, amx_end},
#endif
#if defined(X86)
    {"avx512-vnni", has_avx512_vnni, {8, 6}, 4, 4, DEEP, pack_bytes, expand_bytes, avx512_tile, avx2_direct, 0, 0},
#endif
#if defined(X86_NEW)
    {"avx-vnni", has_avx_vnni, {4, 3}, 4, 4, DEEP, pack_bytes, expand_bytes, avx_tile, avx2_direct, 0, 0},
#endif
#if defined(X86)
    {"avx2", has_avx2, {AVX2_ROWS, AVX2_ROWS}, AVX2_UNIT, 6, AVX2_ROW_BYTES, avx2_pack, avx2_expand, avx2_tile,
     avx2_direct, 0, 0},
#endif
#if defined(ARM) || defined(CT_EMULATE)
    {"neon", has_dot_products, {4, 3}, 4, 4, DEEP, pack_signed, expand_bytes, neon_tile, portable_direct, 0, 0},
#endif
    {"portable", always, {PORTABLE_ROWS, PORTABLE_ROWS}, 4, 4, DEEP, pack_bytes, expand_bytes, portable_tile,
     portable_direct, 0, 0},
};

/* The name of a kernel, or NULL beyond the last. */
const char *ct_product_name(int64_t which) {
    return which < (int64_t)(sizeof KERNELS / sizeof *KERNELS) ? KERNELS[which].name : 0;
}

/* Whether this machine has a kernel's instructions. */
int ct_product_available(int64_t which) { return KERNELS[which].available(); }

/* Codes times values, mod 2^24 with three planes and mod 2^32 with four.
 *
 * which   kernel that is available
 * codes   (rows, depth) int8, one of whose strides is 1
 * values  (depth, planes, columns) bytes, lowest plane first, of the strides given and 1
 * bytes   (rows, planes, bytes_stride) to write to, or NULL
 * total   where bytes is NULL, (rows, total_stride) int32 to write to, or to add to if `add`; the bits above the
 *         planes' are anything
 * Returns 0, or 1 if memory ran out.
 */
int ct_product(int64_t which, const int8_t *codes, int64_t row_stride, int64_t code_stride, int64_t rows, int64_t depth,
               const uint8_t *values, int64_t value_stride, int64_t plane_stride, int64_t planes, int64_t columns,
               uint8_t *bytes, int64_t bytes_stride, int32_t *total, int64_t total_stride, int64_t add) {
    product p = {codes,        row_stride,  code_stride, rows,  depth,        values, value_stride,
                 plane_stride, (int)planes, columns,     bytes, bytes_stride, total,  total_stride,
                 (int)add};
    const kernel *k = KERNELS + which;
    return columns <= k->few ? direct(k, &p) : tiled(k, &p);
}
