/* Holds every product kernel that a processor has against plain sums, without Python: for processors that are emulated.
 *
 * Prints a line a kernel; ends with 1 where a value differs, or where a kernel that was named as an argument is missing.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *ct_product_name(int64_t which);
int ct_product_available(int64_t which);
int ct_product(int64_t which, const int8_t *codes, int64_t row_stride, int64_t code_stride, int64_t rows, int64_t depth,
               const uint8_t *values, int64_t value_stride, int64_t plane_stride, int64_t planes, int64_t columns,
               uint8_t *bytes, int64_t bytes_stride, int32_t *total, int64_t total_stride, int64_t add);

static uint64_t state = 0x9E3779B97F4A7C15u;
static uint32_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}
static int64_t size_of(int64_t most) {
    static const int64_t edges[] = {1, 2, 3, 4, 15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 130, 383, 384, 385, 1025};
    int64_t size = draw() & 1 ? edges[draw() % (sizeof edges / sizeof *edges)] : 1 + draw() % 140;
    return size < most ? size : most;
}

/* One product of random sizes, strides, planes and extreme values. Returns how many values differ. */
static int64_t differences(int64_t which) {
    int64_t rows = size_of(200), depth = size_of(1100), columns = size_of(140), planes = 3 + draw() % 2;
    int across = draw() & 1, add = draw() & 1, as_bytes = draw() & 1;
    int64_t row_stride = across ? 1 : depth + draw() % 5, code_stride = across ? rows + draw() % 5 : 1;
    int64_t plane_stride = columns + draw() % 3, value_stride = planes * plane_stride;
    int64_t total_stride = columns + draw() % 3, bytes_stride = columns + draw() % 3;
    int64_t codes_size = (rows - 1) * row_stride + (depth - 1) * code_stride + 1;
    int8_t *codes = malloc((size_t)codes_size);
    uint8_t *values = malloc((size_t)(depth * value_stride));
    int32_t *total = calloc((size_t)(rows * total_stride), 4);
    uint8_t *bytes = malloc((size_t)(rows * planes * bytes_stride));
    if (!codes || !values || !total || !bytes)
        abort();
    uint32_t extreme = draw() % 4;
    for (int64_t i = 0; i < codes_size; i++)
        codes[i] = (int8_t)(extreme == 1 ? -128 : extreme == 2 ? 127 : draw());
    for (int64_t i = 0; i < depth * value_stride; i++)
        values[i] = (uint8_t)(extreme ? 255 : draw());
    for (int64_t i = 0; i < rows * total_stride; i++)
        total[i] = (int32_t)draw();
    int32_t *before = malloc((size_t)(rows * total_stride) * 4);
    memcpy(before, total, (size_t)(rows * total_stride) * 4);
    if (ct_product(which, codes, row_stride, code_stride, rows, depth, values, value_stride, plane_stride, planes,
                   columns, as_bytes ? bytes : 0, bytes_stride, total, total_stride, add && !as_bytes))
        abort();
    uint32_t mask = planes == 3 ? 0xFFFFFF : 0xFFFFFFFF;
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            uint32_t want = add && !as_bytes ? (uint32_t)before[r * total_stride + c] : 0, found = 0;
            for (int64_t k = 0; k < depth; k++) {
                uint32_t value = 0;
                for (int64_t p = 0; p < planes; p++)
                    value |= (uint32_t)values[k * value_stride + p * plane_stride + c] << (8 * p);
                want += (uint32_t)(int32_t)codes[r * row_stride + k * code_stride] * value;
            }
            if (as_bytes)
                for (int64_t p = 0; p < planes; p++)
                    found |= (uint32_t)bytes[(r * planes + p) * bytes_stride + c] << (8 * p);
            else
                found = (uint32_t)total[r * total_stride + c];
            wrong += (found & mask) != (want & mask);
        }
    free(before), free(bytes), free(total), free(values), free(codes);
    return wrong;
}

int main(int count, char **names) {
    int status = 0, products = 200;
    for (int64_t which = 0; ct_product_name(which); which++) {
        const char *name = ct_product_name(which);
        if (!ct_product_available(which))
            continue;
        int64_t wrong = 0;
        for (int i = 0; i < products; i++)
            wrong += differences(which);
        printf("%s: %d products, %lld values differ\n", name, products, (long long)wrong);
        status |= wrong != 0;
        for (int i = 1; i < count; i++)
            if (!strcmp(names[i], name))
                names[i] = "";
    }
    for (int i = 1; i < count; i++)
        if (*names[i])
            printf("%s: missing\n", names[i]), status = 1;
    return status;
}
