/* The C decoder as a library that answers with a reason and keeps in memory what it would have written to files.
 * Build: cc -std=gnu11 -O2 -shared -fPIC decoder.c -o decoder.so */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST_OUTPUTS = 1 << 17 };
static char *outputs[MOST_OUTPUTS];
static size_t sizes[MOST_OUTPUTS], n_files, largest, limit = (size_t)1 << 30;

static void *limited(size_t count, size_t size) {
    if (count * size > largest) largest = count * size;
    if (count * size > limit) abort();
    return calloc(count, size);
}
static FILE *captured(const char *path, const char *mode) {
    (void)path, (void)mode;
    if (n_files == MOST_OUTPUTS) return NULL;
    FILE *file = open_memstream(&outputs[n_files], &sizes[n_files]);
    n_files++;
    return file;
}

#define calloc limited
#define fopen captured
#define main qmoe_main
#include "../../conformance/adapters/c/qmoe_decode.c"
#undef calloc
#undef fopen
#undef main

/* NULL: accepted. The bytes are those of a file, or `path` names a directory. */
const char *qmoe_verdict(const char *path, const uint8_t *bytes, size_t n, int check_canonical) {
    while (n_files > 0) free(outputs[--n_files]);
    out_directory = "";
    n_outputs = largest = 0;
    deep = check_canonical != 0;
    listing = captured("", "");
    fputs("[", listing);
    bool accepted = decode(path, (Span){bytes, n});
    fputs("]\n", listing);
    end_file(&listing);
    return accepted ? NULL : reason;
}
/* Output 0 is the list, the others are the tensors in its order. */
const char *qmoe_output(size_t i, size_t *n) {
    *n = i < n_files ? sizes[i] : 0;
    return i < n_files ? outputs[i] : NULL;
}
size_t qmoe_largest(void) { return largest; }
