/* Calls of the other loops, made by the threads of an OpenMP team that already runs: that of whoever uses this library.
 * Built without OpenMP, for a second runtime would fight the first one.
 */
#include <stdint.h>

/* The loops; see kernels.c and product.c. */
int ct_masks(const double *, int64_t, const void *, int64_t, int64_t, int64_t, const uint8_t *, int64_t, int64_t,
             int32_t *);
int ct_hint_masks(const uint8_t *, const void *, int64_t, int64_t, int64_t, int32_t *);
void ct_encrypt(const int32_t *, int64_t, int64_t, const float *, int64_t, const double *, int64_t, int64_t, int64_t,
                uint8_t *, int64_t);
void ct_decrypt(const uint8_t *, int64_t, const int32_t *, int64_t, int64_t, const float *, int64_t, int64_t, int64_t,
                float *, int64_t);
void ct_norms(const float *, int64_t, int64_t, int64_t, double *);
void ct_weighted_sums(const uint8_t *, int64_t, int64_t, int64_t, int64_t, int64_t, const void *, int64_t, int64_t,
                      int32_t *, int64_t);
int ct_product(int64_t, const int8_t *, int64_t, int64_t, int64_t, int64_t, const uint8_t *, int64_t, int64_t, int64_t,
               int64_t, uint8_t *, int64_t, int32_t *, int64_t, int64_t);

#define ARGUMENTS 16

typedef struct {
    int64_t (*function)(const int64_t *arguments);
    int64_t arguments[ARGUMENTS];
    int64_t status; /* what the function returned */
} call;

typedef struct {
    call *calls;
    int64_t count;
    int (*number)(void);  /* of a thread in its team, from 0 up */
    int (*members)(void); /* of that team */
} team;

/* What every thread of a team runs: its share of the calls. */
void ct_team(void *memory) {
    const team *t = memory;
    int64_t members = t->members();
    for (int64_t i = t->number(); i < t->count; i += members)
        t->calls[i].status = t->calls[i].function(t->calls[i].arguments);
}

#define P(type, i) ((type *)(intptr_t)a[i])

int64_t ct_call_masks(const int64_t *a) {
    return ct_masks(P(const double, 0), a[1], P(const void, 2), a[3], a[4], a[5], P(const uint8_t, 6), a[7], a[8],
                    P(int32_t, 9));
}
int64_t ct_call_hint_masks(const int64_t *a) {
    return ct_hint_masks(P(const uint8_t, 0), P(const void, 1), a[2], a[3], a[4], P(int32_t, 5));
}
int64_t ct_call_encrypt(const int64_t *a) {
    ct_encrypt(P(const int32_t, 0), a[1], a[2], P(const float, 3), a[4], P(const double, 5), a[6], a[7], a[8],
               P(uint8_t, 9), a[10]);
    return 0;
}
int64_t ct_call_decrypt(const int64_t *a) {
    ct_decrypt(P(const uint8_t, 0), a[1], P(const int32_t, 2), a[3], a[4], P(const float, 5), a[6], a[7], a[8],
               P(float, 9), a[10]);
    return 0;
}
int64_t ct_call_norms(const int64_t *a) {
    ct_norms(P(const float, 0), a[1], a[2], a[3], P(double, 4));
    return 0;
}
int64_t ct_call_weighted_sums(const int64_t *a) {
    ct_weighted_sums(P(const uint8_t, 0), a[1], a[2], a[3], a[4], a[5], P(const void, 6), a[7], a[8], P(int32_t, 9),
                     a[10]);
    return 0;
}
int64_t ct_call_product(const int64_t *a) {
    return ct_product(a[0], P(const int8_t, 1), a[2], a[3], a[4], a[5], P(const uint8_t, 6), a[7], a[8], a[9], a[10],
                      P(uint8_t, 11), a[12], P(int32_t, 13), a[14], a[15]);
}
