/* A decoder of the qmoecodec file format, version 1.0, written from spec/SPEC.md alone: C11 and POSIX, no library.
 *     qmoe_decode decode IN --out DIR [--deep]  or  qmoe_decode serve        (conformance/PROTOCOL.md)
 * Section and requirement numbers are those of SPEC.md; the checks stand in the order of its
 * §9. Files are mapped, not read, and nothing is allocated that the file's own bytes do not account for (REQ-GEN-002).
 * Build: cc -std=c11 -O2 -Wall -Wextra -Wpedantic -Werror qmoe_decode.c -o qmoe_decode   (for libFuzzer: -DQMOE_FUZZ=1) */
#define _XOPEN_SOURCE 700
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef QMOE_FUZZ
#define QMOE_FUZZ 0 /* 1: a libFuzzer target, which takes any checksum */
#endif
/* ---- Rejecting, and memory that is given back at once ------------------------------------------------------------------- */
typedef struct Block { struct Block *next; void *map; size_t size, unused; } Block; /* a mapped file, or the bytes that follow */
static jmp_buf rejected; static const char *reason; static Block *blocks;
static bool deep, canonical; /* also check that the encoding is canonical, at last; what was found */
#define need(ok, why) do { if (!(ok)) reject(why); } while (0)
_Noreturn static void reject(const char *why) { reason = why; longjmp(rejected, 1); }
_Noreturn static void die(const char *what) { perror(what); exit(3); }
static void *take(uint64_t count, size_t size) { /* zeroed */
    Block *block = count < (SIZE_MAX - sizeof(Block)) / (size + 1) ? calloc(1, sizeof(Block) + count * size) : NULL;
    if (block == NULL) die("memory");
    block->next = blocks;
    return (blocks = block) + 1;
}
static void give_back(const Block *until) {
    for (Block *block; (block = blocks) != until; free(block)) {
        blocks = block->next;
        if (block->map != NULL) munmap(block->map, block->size);
    }
}
/* ---- Bytes, and sets of strings ------------------------------------------------------------------------------------------ */
typedef struct { const uint8_t *p; size_t n; } Span;
typedef struct { Span key; void *value; } Slot;
typedef struct { Slot *slots; size_t size; } Set;
static int order(Span a, Span b) {
    size_t n = a.n < b.n ? a.n : b.n; int first = n != 0 ? memcmp(a.p, b.p, n) : 0;
    return first != 0 ? first : (a.n > b.n) - (a.n < b.n);
}
static Span word(const char *text) { return (Span){(const uint8_t *)text, strlen(text)}; }
static bool equals(Span a, const char *text) { return order(a, word(text)) == 0; }
static bool begins(Span a, const char *text) { return a.n >= strlen(text) && memcmp(a.p, text, strlen(text)) == 0; }
static bool is_reserved(Span a) { return begins(a, "qmoecodec.") || equals(a, "__metadata__"); } /* REQ-MET-013 */
static bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }
static uint64_t hash(Span s, uint64_t h) { for (size_t i = 0; i < s.n; i++) h = (h ^ s.p[i]) * 0x100000001B3; return h; }
static Set new_set(uint64_t n) { return (Set){take(2 * n + 1, sizeof(Slot)), 2 * n + 1}; }
static Slot *slot_of(Set s, Span key, uint64_t h) { /* where the key is, or could be put; h is its hash */
    size_t i = h % s.size;
    while (s.slots[i].value != NULL && order(s.slots[i].key, key) != 0) i = (i + 1) % s.size;
    return &s.slots[i];
}
static Slot *slot(Set s, Span key) { return slot_of(s, key, hash(key, 0)); }
static bool add(Set s, Span key, void *value) { /* false: it is there already */
    Slot *at = slot(s, key); bool new = at->value == NULL;
    if (new) *at = (Slot){key, value};
    return new;
}
static uint64_t little(const uint8_t *p, unsigned n) { uint64_t v = 0; while (n-- > 0) v = v << 8 | p[n]; return v; }
static uint32_t crc32(uint32_t crc, const uint8_t *p, size_t n) {
    static uint32_t table[256];
    for (uint32_t i = 0, k; table[255] == 0 && i < 256; i++)
        for (table[i] = i, k = 0; k < 8; k++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    crc = ~crc;
    for (size_t i = 0; i < n; i++) crc = table[(crc ^ p[i]) & 255] ^ crc >> 8;
    return ~crc;
}
static bool is_utf8(Span s) {
    for (size_t i = 0, more; i < s.n; i += more) {
        unsigned c = s.p[i++], d = i < s.n ? s.p[i] : 0; more = c < 0x80 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
        if ((c >= 0x80 && c < 0xC2) || c > 0xF4 || more > s.n - i) return false;
        for (size_t k = 0; k < more; k++) if ((s.p[i + k] & 0xC0) != 0x80) return false;
        if ((c == 0xE0 && d < 0xA0) || (c == 0xED && d > 0x9F) || (c == 0xF0 && d < 0x90) || (c == 0xF4 && d > 0x8F)) return false;
    }
    return true;
}
/* ---- JSON (§2.2) ---------------------------------------------------------------------------------------------------------- */
enum { HEADER, METADATA, SHARD_INDEX, MAX_DEPTH = 16, MAX_TEXT = 100000000, MAX_VALUES = 1 << 20 };
typedef struct Json {
    char type; bool used; Span key; struct Json *next; /* type: { [ " 0 and t for a literal */
    union { Span text; uint64_t number; struct { struct Json *first; uint64_t count; }; };
} Json;
typedef struct {
    uint8_t *p; /* in a copy that ends with a byte 0, which no JSON text may hold; strings are resolved in place */
    int kind, depth, n_values; bool canonical, any_number; Json *spare; size_t n_spare; /* spare: nodes */
} Text;
static void spaces(Text *t) { for (; *t->p != 0 && strchr(" \t\n\r", *t->p) != NULL; t->p++) t->canonical = false; }
static int hex4(Text *t) { /* -1: these are not four hexadecimal digits */
    int value = 0;
    for (uint8_t *end = t->p + 4; t->p < end; t->p++) {
        uint8_t c = *t->p, low = c | 32;
        if (!is_digit(c) && (low < 'a' || low > 'f')) return -1;
        if (c >= 'A' && c <= 'F') t->canonical = false;
        value = value << 4 | (is_digit(c) ? c - '0' : low - 'a' + 10);
    }
    return value;
}
static Span string(Text *t) {
    static const char plain[] = "\"\\bfnrt/", meant[] = "\"\\\b\f\n\r\t/";
    uint8_t *from = ++t->p, *out = from, c;
    while ((c = *t->p++) != '"') {
        need(c >= 0x20, "header_json");
        if (c > 0x7E) t->canonical = false;
        if (c != '\\') { *out++ = c; continue; }
        const char *found = (c = *t->p++) != 0 ? strchr(plain, c) : NULL;
        if (c == '/') t->canonical = false;
        if (found != NULL) { *out++ = (uint8_t)meant[found - plain]; continue; }
        int code = c == 'u' ? hex4(t) : -1, low, more; need(code >= 0, "header_json");
        if ((code >= 0x20 && code < 0x7F) || (code >= 8 && code <= 13 && code != 11)) t->canonical = false;
        need(code >> 10 != 0x37, "header_encoding"); /* REQ-JSN-006 */
        if (code >> 10 == 0x36) {
            low = t->p[0] == '\\' && t->p[1] == 'u' ? (t->p += 2, hex4(t)) : -1;
            need(low >> 10 == 0x37, "header_encoding"); code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
        }
        more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        *out++ = (uint8_t)(more == 0 ? code : (0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
        while (more-- > 0) *out++ = (uint8_t)(0x80 | (code >> 6 * more & 0x3F));
    }
    return (Span){from, (size_t)(out - from)};
}
static uint64_t number(Text *t) { /* the longest JSON number that stands here, then REQ-JSN-004 */
    bool whole = *t->p != '-'; uint64_t value = 0; uint8_t *from = t->p += !whole, *e; need(is_digit(*from), "header_json");
    for (; is_digit(*t->p) && (t->p == from || *from != '0'); value = value * 10 + *t->p++ - '0')
        whole = whole && value <= ((uint64_t)INT64_MAX - (*t->p - '0')) / 10;
    if (*t->p == '.' && is_digit(t->p[1])) for (whole = false, t->p++; is_digit(*t->p);) t->p++;
    if ((*t->p | 32) == 'e' && is_digit(*(e = t->p + (t->p[1] == '+' || t->p[1] == '-' ? 2 : 1))))
        for (whole = false, t->p = e; is_digit(*t->p);) t->p++;
    need(whole || t->any_number, "json_number");
    return value;
}
static Json *value(Text *t, Span key) {
    need(t->n_values++ < MAX_VALUES, "json_size"); if (t->n_spare == 0) t->spare = take(t->n_spare = 64, sizeof(Json)); /* REQ-JSN-007 */
    Json *v = &t->spare[--t->n_spare], **link = &v->first; const uint8_t c = *t->p, close = c == '{' ? '}' : ']';
    *v = (Json){.type = (char)(is_digit(c) || c == '-' ? '0' : c), .key = key};
    if (c == '"') v->text = string(t);
    else if (v->type == '0') v->number = number(t);
    else if (c != '{' && c != '[') {
        int size = strncmp((char *)t->p, "true", 4) == 0 || strncmp((char *)t->p, "null", 4) == 0 ? 4 : 5;
        need(size == 4 || strncmp((char *)t->p, "false", 5) == 0, "header_json"); t->p += size; v->type = 't';
    } else {
        need(t->depth++ < MAX_DEPTH, "json_depth"); /* REQ-JSN-003 */
        const Json *last = NULL;
        for (t->p++, spaces(t); *t->p != close || v->count != 0; spaces(t)) {
            Span name = {NULL, 0};
            if (c == '{') {
                need(*t->p == '"', "header_json"); name = string(t);
                if (last != NULL && order(last->key, name) > 0) t->canonical = false;
                spaces(t); need(*t->p++ == ':', "header_json"); spaces(t);
            }
            t->any_number = t->any_number || (t->kind == SHARD_INDEX && t->depth == 1 && equals(name, "metadata"));
            last = *link = value(t, name); t->any_number = t->any_number && t->depth > 1; link = &(*link)->next;
            v->count++; spaces(t);
            if (*t->p == close) break;
            need(*t->p++ == ',', "header_json");
        }
        t->p++; t->depth--; const Block *before = blocks;
        Set keys = new_set(c == '{' ? v->count : 0); /* REQ-JSN-002 */
        for (Json *m = v->first; c == '{' && m != NULL; m = m->next) need(add(keys, m->key, m), "duplicate_key");
        give_back(before);
    }
    return v;
}
static Json *parse(Span s, int kind, bool *is_canonical) { /* checks a whole text and returns its object */
    need(!begins(s, "\xEF\xBB\xBF") && (kind == METADATA || is_utf8(s)), "header_encoding"); /* REQ-CON-004 */
    uint8_t *copy = take(s.n + 8, 1), *object_end;
    if (s.n != 0) memcpy(copy, s.p, s.n);
    Text t = {.p = copy, .kind = kind, .canonical = true};
    if (kind != HEADER) spaces(&t);
    need(*t.p == '{', "header_json"); /* REQ-CON-005 */
    Json *root = value(&t, (Span){NULL, 0}); object_end = t.p;
    if (kind != HEADER) spaces(&t);
    while (kind == HEADER && *t.p == ' ') t.p++;
    need(t.p == copy + s.n && (kind != HEADER || t.p - object_end <= 63), "header_json"); /* REQ-CON-006 */
    return *is_canonical = t.canonical, root;
}
static Json *member(const Json *object, const char *key, char type, const char *why) { /* type 0: any */
    Json *m = object->first;
    while (m != NULL && !equals(m->key, key)) m = m->next;
    need(m != NULL && (type == 0 || m->type == type), why); m->used = true;
    return m;
}
static void no_other(const Json *object, bool extensible, const char *why) { /* rejects members that nobody has asked for */
    for (Json *m = object->first; m != NULL; m = m->next) need(m->used || (extensible && begins(m->key, "x-")), why);
}
static uint64_t numbers(const Json *list, uint64_t *out, uint64_t most) { /* how many; UINT64_MAX: not an array of numbers */
    if (list->type != '[') return UINT64_MAX;
    for (const Json *m = list->first; m != NULL; m = m->next, out += most != 0, most -= most != 0)
        if (m->type != '0') return UINT64_MAX; else if (most != 0) *out = m->number;
    return list->count;
}
/* ---- The parts of a file --------------------------------------------------------------------------------------------------- */
typedef struct { const char *name; unsigned size; uint64_t exponent; } Dtype;
static const Dtype DTYPES[] = {
    {"BOOL", 1, 0}, {"U8", 1, 0}, {"I8", 1, 0}, {"F8_E5M2", 1, 0}, {"F8_E4M3", 1, 0}, {"F8_E8M0", 1, 0},
    {"U16", 2, 0}, {"I16", 2, 0}, {"F16", 2, 0x7C00}, {"BF16", 2, 0x7F80}, {"U32", 4, 0}, {"I32", 4, 0},
    {"F32", 4, 0x7F800000}, {"U64", 8, 0}, {"I64", 8, 0}, {"F64", 8, 0x7FF0000000000000}, {"C64", 8, 0}, {NULL, 0, 0}};
enum { CODES, CODE_OFFSETS, ROW_LENGTHS, LEVELS, DICTIONARY_INDEX, CHECKSUMS, ROLES };
static const char *const ROLE[] = {"codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums"};
typedef struct { Span name; const Dtype *dtype; uint64_t rank, shape[8], begin, end; const uint8_t *bytes; bool used; } Tensor;
typedef struct { uint32_t parent; uint8_t digit, depth, symbol; } Node;
typedef struct {
    bool table; unsigned bits, longest; uint64_t threshold, n_leaf[2], n_incomplete[2];
    uint32_t crc, *leaf[2], *incomplete[2]; /* aivf: the nodes of the codewords; node 0 is both roots */
    Node *nodes; Tensor *tensor; Span *phrases; Set phrase_set; /* table: phrases */
} Dictionary;
typedef struct {
    Span name, source, tail; /* stacked: the template up to and after its `{}` */
    bool stacked, matrix; uint64_t shape[3], base, bits; const Json *ranges; const Dtype *dtype; Tensor *role[ROLES];
} Group;
typedef struct { Span name; uint32_t crc; Tensor *tensor; } Passthrough;
typedef struct {
    uint64_t n_tensors, n_dictionaries, n_groups, n_passthrough, n_named; /* n_named: by the shard index */
    Span bytes; Tensor *tensors; Set by_name; Dictionary *dictionaries; Group *groups; Passthrough *passthrough;
} File;
static const Dtype *dtype_of(Span name) {
    for (const Dtype *d = DTYPES; d->name != NULL; d++) if (equals(name, d->name)) return d;
    return NULL;
}
static bool product(const uint64_t *shape, uint64_t rank, uint64_t limit, uint64_t *all) { /* exact; false: `limit` or above */
    *all = 1;
    for (uint64_t i = 0; i < rank; i++) if (shape[i] == 0) *all = 0;
    for (uint64_t i = 0; i < rank && *all != 0; *all *= shape[i++]) if (*all > (limit - 1) / shape[i]) return false;
    return true;
}
static void check_role(const Tensor *t, const char *dtype, uint64_t rank, const uint64_t *shape) {
    need(strcmp(t->dtype->name, dtype) == 0, "role_dtype"); need(t->rank == rank, "role_shape");
    for (uint64_t i = 0; shape != NULL && i < rank; i++) need(t->shape[i] == shape[i], "role_shape");
}
/* ---- §2.3 ------------------------------------------------------------------------------------------------------------------- */
static void read_tensor(Tensor *t, const Json *entry, Span data) {
    uint64_t place[2], elements;
    need(entry->type == '{', "header_schema"); /* REQ-TEN-001 */
    const Json *dtype = member(entry, "dtype", '"', "header_schema");
    t->rank = numbers(member(entry, "shape", 0, "header_schema"), t->shape, 8);
    need(t->rank != UINT64_MAX && numbers(member(entry, "data_offsets", 0, "header_schema"), place, 2) == 2, "header_schema");
    no_other(entry, false, "header_schema");
    need(t->rank <= 8, "shape_rank");                                                           /* REQ-TEN-003 */
    need((t->dtype = dtype_of(dtype->text)) != NULL, "unknown_dtype");                          /* REQ-TEN-004 */
    need((t->begin = place[0]) <= (t->end = place[1]), "offset_order");                         /* REQ-TEN-005 */
    need(product(t->shape, t->rank, (uint64_t)1 << 63, &elements), "shape_overflow");            /* REQ-TEN-007 */
    place[1] -= place[0];
    need(place[1] % t->dtype->size == 0 && place[1] / t->dtype->size == elements, "tensor_size"); /* REQ-TEN-006 */
    need(t->end <= data.n, "truncated");                                                        /* REQ-TEN-008 */
    need(t->begin % t->dtype->size == 0, "misaligned");                                         /* REQ-TEN-009 */
    t->bytes = data.p + t->begin;
}
static int by_place(const void *a, const void *b) {
    const Tensor *s = *(Tensor *const *)a, *t = *(Tensor *const *)b;
    return s->begin != t->begin ? (s->begin < t->begin ? -1 : 1) : (s->end > t->end) - (s->end < t->end);
}
static void read_tensors(File *f, const Json *header, Span data) {
    uint64_t at = 0, n = 0;
    for (const Json *m = header->first; m != NULL; m = m->next) n += !equals(m->key, "__metadata__");
    need(n <= 65536, "tensor_count"); /* REQ-TEN-002 */
    f->tensors = take(n, sizeof(Tensor)); f->by_name = new_set(n); Tensor **sorted = take(n, sizeof(Tensor *));
    for (const Json *m = header->first; m != NULL; m = m->next) {
        if (equals(m->key, "__metadata__")) continue;
        Tensor *t = sorted[f->n_tensors] = &f->tensors[f->n_tensors]; add(f->by_name, t->name = m->key, t);
        read_tensor(t, m, data); f->n_tensors++;
    }
    qsort(sorted, n, sizeof(Tensor *), by_place);
    for (uint64_t i = 0; i < n; at = sorted[i++]->end) {
        need(sorted[i]->begin >= at, "tensor_overlap"); /* REQ-TEN-010 */
        need(sorted[i]->begin <= at, "tensor_hole");    /* REQ-TEN-011 */
    }
    need(at == data.n, "trailing_data");                /* REQ-TEN-012 */
}
/* ---- §3, with the metadata of §4.1 and §6.1 --------------------------------------------------------------------------------- */
static Json *field(const Json *object, const char *key, char type) {
    need(object->type == '{', "metadata_schema");
    return member(object, key, type, "metadata_schema");
}
static uint32_t read_crc(const Json *v) {
    uint32_t crc = 0; need(v->type == '"' && v->text.n == 8, "metadata_schema");
    for (const uint8_t *p = v->text.p, *end = p + 8; p < end; p++) {
        need(is_digit(*p) || (*p >= 'a' && *p <= 'f'), "metadata_schema");
        crc = crc << 4 | (uint32_t)(is_digit(*p) ? *p - '0' : *p - 'a' + 10);
    }
    return crc;
}
static unsigned read_code_bits(const Json *object) {
    uint64_t bits = field(object, "code_bits", '0')->number; need(bits == 8 || bits == 12 || bits == 16, "metadata_schema");
    return (unsigned)bits;
}
static uint64_t read_features(const Json *root, const char *key) {
    const Json *list = field(root, key, '[');
    for (const Json *m = list->first, *last = NULL; m != NULL; last = m, m = m->next)
        need(m->type == '"' && (last == NULL || order(last->text, m->text) < 0), "metadata_schema");
    return list->count;
}
static void check_version(Span s) { /* REQ-MET-004, REQ-MET-005 */
    for (size_t at = 0, from = 0, part = 0; part < 2; from = at, part++) {
        while (at < s.n && is_digit(s.p[at])) at++;
        need(at > from && at - from <= 4 && (s.p[from] != '0' || at - from == 1), "metadata_schema");
        need(part == 0 ? at < s.n && s.p[at++] == '.' : at == s.n, "metadata_schema");
    }
    need(begins(s, "1."), "unsupported_version");
}
static void read_dictionary_entry(Dictionary *d, const Json *m) {
    Span kind = field(m, "kind", '"')->text;
    need((d->table = equals(kind, "table")) || equals(kind, "aivf"), "metadata_schema"); /* REQ-DIC-002 */
    d->bits = read_code_bits(m); d->threshold = field(m, "threshold", '0')->number;
    d->crc = read_crc(field(m, "crc32", '"')); no_other(m, true, "metadata_schema");
    need(d->threshold <= (uint64_t)1 << d->bits, "dictionary_threshold");              /* REQ-DIC-003 */
    need(!d->table || d->threshold == (uint64_t)1 << d->bits, "dictionary_threshold"); /* REQ-DIC-009 */
}
static void read_group(Group *g, const Json *m, const Group *before) {
    uint64_t all, count = 0, last = 0, pair[2], holes = 0; g->name = field(m, "name", '"')->text;
    Span layout = field(m, "layout", '"')->text, source = g->source = field(m, "source", '"')->text;
    g->stacked = equals(layout, "stacked"); g->matrix = equals(layout, "matrix");
    need(g->stacked || g->matrix || equals(layout, "fused"), "metadata_schema");
    need(g->name.n >= 1 && g->name.n <= 4096 && source.n <= 4096 && numbers(field(m, "shape", '['), g->shape, 3) == 3, "metadata_schema");
    g->dtype = dtype_of(field(m, "dtype", '"')->text); g->bits = read_code_bits(m);
    g->base = field(m, "row_length_base", '0')->number;
    need(g->dtype != NULL && g->dtype->exponent != 0 && g->base <= UINT32_MAX, "metadata_schema");
    if (g->stacked) g->ranges = field(m, "expert_ranges", '[');
    no_other(m, true, "metadata_schema");
    for (size_t i = 0; g->stacked && i + 1 < source.n; i++) {
        if (memcmp(source.p + i, "{}", 2) != 0) continue;
        holes++; g->source.n = i; g->tail = (Span){source.p + i + 2, source.n - i - 2};
    }
    need(!g->stacked || holes == 1, "metadata_schema");
    need(before == NULL || order(before->name, g->name) < 0, "metadata_schema"); /* REQ-GRP-002 */
    need(!g->matrix || g->shape[0] == 1, "metadata_schema");                     /* REQ-GRP-003 */
    for (const Json *r = g->stacked ? g->ranges->first : NULL; r != NULL; r = r->next, last = pair[1]) { /* REQ-GRP-004 */
        need(numbers(r, pair, 2) == 2 && pair[0] < pair[1] && pair[1] <= (uint64_t)1 << 32, "metadata_schema");
        need(count == 0 || pair[0] > last, "metadata_schema"); count += pair[1] - pair[0];
    }
    need(!g->stacked || count == g->shape[0], "metadata_schema");
    need((g->shape[0] | g->shape[1] | g->shape[2]) >> 31 == 0, "shape_overflow"); /* REQ-GRP-006 */
    need(product(g->shape, 3, (uint64_t)1 << 62, &all), "shape_overflow");
    need(!is_reserved(g->name) && !is_reserved(source), "reserved_name");
}
static void read_metadata(File *f, Span text) {
    bool canonical_text; const Json *root = parse(text, METADATA, &canonical_text), *m;
    check_version(field(root, "format_version", '"')->text);
    need(read_features(root, "required_features") == 0, "unsupported_feature"); /* REQ-MET-006 */
    need(canonical_text, "metadata_canonical"); read_features(root, "optional_features"); /* REQ-MET-003 */
    const Json *dictionaries = field(root, "dictionaries", '['), *groups = field(root, "groups", '[');
    const Json *passthrough = field(root, "passthrough", '{');
    no_other(root, true, "metadata_schema");                                    /* REQ-MET-009, REQ-MET-010 */
    need(dictionaries->count <= 256, "metadata_schema"); f->dictionaries = take(dictionaries->count, sizeof(Dictionary));
    for (m = dictionaries->first; m != NULL; m = m->next) read_dictionary_entry(&f->dictionaries[f->n_dictionaries++], m);
    f->groups = take(groups->count, sizeof(Group));
    for (Group *g = f->groups; (m = g == f->groups ? groups->first : m->next) != NULL; g++, f->n_groups++)
        read_group(g, m, g == f->groups ? NULL : g - 1);
    f->passthrough = take(passthrough->count, sizeof(Passthrough));
    for (m = passthrough->first; m != NULL; m = m->next, f->n_passthrough++) {
        f->passthrough[f->n_passthrough] = (Passthrough){m->key, read_crc(m), NULL}; need(!is_reserved(m->key), "reserved_name");
    }
}
/* ---- Source names (REQ-GRP-005, REQ-SHD-006): too many to spell them all out, so a table of hashes ---------------------- */
typedef struct { Span head, tail; char number[24]; } Source;
static int source_byte(const Source *s, size_t i) { /* of head, number and tail; -1 beyond */
    size_t n = strlen(s->number);
    return i < s->head.n ? s->head.p[i] : (i -= s->head.n) < n ? s->number[i] : (i -= n) < s->tail.n ? s->tail.p[i] : -1;
}
static void add_source(Source *table, uint64_t size, Source new) {
    uint64_t i = hash(new.tail, hash(word(new.number), hash(new.head, 0))) % size;
    for (; table[i].head.p != NULL; i = (i + 1) % size)
        for (size_t b = 0; source_byte(&table[i], b) == source_byte(&new, b); b++)
            need(source_byte(&new, b) >= 0, "source_conflict");
    table[i] = new;
}
static void check_sources(const File *files, size_t n_files) {
    uint64_t n = 1;
    for (const File *f = files; f < files + n_files; n += f++->n_passthrough)
        for (const Group *g = f->groups; g < f->groups + f->n_groups; g++) n += g->shape[0] + 1;
    Source *table = take(2 * n, sizeof(Source));
    for (const File *f = files; f < files + n_files; f++) {
        for (uint64_t i = 0; i < f->n_passthrough; i++) add_source(table, 2 * n, (Source){.head = f->passthrough[i].name});
        for (const Group *g = f->groups; g < f->groups + f->n_groups; g++) {
            Source source = {.head = g->source, .tail = g->tail};
            if (!g->stacked) add_source(table, 2 * n, source);
            for (const Json *r = g->stacked ? g->ranges->first : NULL; r != NULL; r = r->next)
                for (uint64_t e = r->first->number; e < r->first->next->number; e++) {
                    snprintf(source.number, sizeof source.number, "%" PRIu64, e); add_source(table, 2 * n, source);
                }
        }
    }
}
/* ---- What a reader checks when it opens a file (§2, §3, REQ-CRC-005) -------------------------------------------------------- */
static Tensor *use(const File *f, Span name, bool *missing, bool *twice) {
    Tensor *t = slot(f->by_name, name)->value; *missing = *missing || t == NULL; *twice = *twice || (t != NULL && t->used);
    if (t != NULL) t->used = true;
    return t;
}
static void check_roles(const Group *g) { /* REQ-GRP-007, REQ-GRP-008 */
    const uint64_t experts = g->shape[0], rows = g->shape[1], rank[ROLES] = {1, 1, 2, 3, 1, 1};
    const uint64_t shape[ROLES][3] =
        {{g->role[CODES]->shape[0]}, {experts + 1}, {experts, rows}, {experts, rows, 2}, {experts}, {experts}};
    const char *lengths = g->role[ROW_LENGTHS]->dtype->name; bool narrow = strcmp(lengths, "U8") == 0 || strcmp(lengths, "U16") == 0;
    const char *const dtype[ROLES] = {"U8", "U64", narrow ? lengths : "U32", g->dtype->name, "U8", "U32"};
    for (int r = 0; r < ROLES; r++) check_role(g->role[r], dtype[r], rank[r], shape[r]);
}
static void open_file(File *f) {
    const Span all = f->bytes; const uint64_t n = all.n < 8 ? 0 : little(all.p, 8), one = 1;
    bool missing = false, twice = false; char name[4096 + 64];
    need(all.n >= 8, "truncated"); need(n >= 2 && n <= MAX_TEXT && n % 8 == 0, "header_size");                   /* REQ-CON-002, REQ-CON-003 */
    need(n <= all.n - 8, "truncated");                                            /* REQ-CON-001 */
    const Json *header = parse((Span){all.p + 8, n}, HEADER, &missing); missing = false; read_tensors(f, header, (Span){all.p + 8 + n, all.n - 8 - n});
    const Json *metadata = member(header, "__metadata__", 0, "not_packed"); need(metadata->type == '{', "header_schema"); /* REQ-MET-001 */
    for (const Json *m = metadata->first; m != NULL; m = m->next) need(m->type == '"', "header_schema");
    const Json *text = member(metadata, "qmoecodec", '"', "not_packed");          /* REQ-MET-002 */
    const Tensor *sum = use(f, word("qmoecodec.header_crc32"), &missing, &twice); need(sum != NULL, "missing_tensor");
    check_role(sum, "U32", 1, &one);                                              /* REQ-CRC-004 */
    need(QMOE_FUZZ || crc32(0, all.p, 8 + n) == little(sum->bytes, 4), "checksum");            /* REQ-CRC-005 */
    read_metadata(f, text->text);
    for (uint64_t i = 0; i < f->n_dictionaries; i++) {
        snprintf(name, sizeof name, "qmoecodec.dictionary.%" PRIu64, i);
        f->dictionaries[i].tensor = use(f, word(name), &missing, &twice);
    }
    for (Group *g = f->groups; g < f->groups + f->n_groups; g++) {
        memcpy(name, g->name.p, g->name.n);
        for (int r = 0; r < ROLES; r++) {
            int size = snprintf(name + g->name.n, 64, "_%s", ROLE[r]);
            g->role[r] = use(f, (Span){(uint8_t *)name, g->name.n + (size_t)size}, &missing, &twice);
        }
    }
    for (Passthrough *t = f->passthrough; t < f->passthrough + f->n_passthrough; t++) t->tensor = use(f, t->name, &missing, &twice);
    for (uint64_t i = 0; i < f->n_tensors; i++) need(f->tensors[i].used && !twice, "orphan_tensor"); /* REQ-MET-011 */
    need(!missing, "missing_tensor");                                             /* REQ-MET-012 */
    for (uint64_t i = 0; i < f->n_dictionaries; i++) check_role(f->dictionaries[i].tensor, "U8", 1, NULL); /* REQ-DIC-001 */
    for (uint64_t i = 0; i < f->n_groups; i++) check_roles(&f->groups[i]);
    check_sources(f, 1); /* the number of experts is bounded by now */
}
/* ---- §4 ---------------------------------------------------------------------------------------------------------------------- */
/* Reads the node at symbol `*at` and all below it. */
static void read_node(Dictionary *d, uint64_t *at, int tree, uint32_t parent, unsigned digit, unsigned depth) {
    need(*at / 4 < d->tensor->end - d->tensor->begin, "dictionary_size"); /* REQ-DIC-005 */
    unsigned symbol = d->tensor->bytes[*at / 4] >> 2 * (*at % 4) & 3; uint32_t self = (uint32_t)++*at;
    need(symbol != 3, "dictionary_symbol");                               /* REQ-DIC-004 */
    need(symbol != 0 || d->n_leaf[tree] < d->threshold, "dictionary_threshold"); /* REQ-DIC-008 */
    need(symbol != 1 || d->n_incomplete[tree] < ((uint64_t)1 << d->bits) - d->threshold, "dictionary_threshold");
    need(symbol == 0 || depth < 255, "dictionary_phrase_length");         /* REQ-DIC-007 */
    d->nodes[self] = (Node){parent, (uint8_t)digit, (uint8_t)depth, (uint8_t)symbol};
    if (symbol == 0) d->leaf[tree][d->n_leaf[tree]++] = self;
    if (symbol == 1) d->incomplete[tree][d->n_incomplete[tree]++] = self;
    d->longest = depth > d->longest ? depth : d->longest;
    for (unsigned child = 0; child < (symbol == 2 ? 3 : symbol); child++) read_node(d, at, tree, self, child, depth + 1);
}
static void read_aivf(Dictionary *d, Span s) {
    uint64_t most = (4u << d->bits) + 1024, at = 0; /* nodes: at most one internal node for two leaves, and those on the way down */
    if (s.n < most / 4) most = 4 * s.n + 1;
    d->nodes = take(most, sizeof(Node));
    for (unsigned tree = 0, digit; tree < 2; tree++) {
        d->leaf[tree] = take(most < d->threshold ? most : d->threshold, sizeof(uint32_t));
        d->incomplete[tree] = take(most < 1u << d->bits ? most : 1u << d->bits, sizeof(uint32_t));
        for (digit = tree; digit < 3; digit++) read_node(d, &at, (int)tree, 0, digit, 1);
    }
    need(s.n == (at + 3) / 4, "dictionary_size");
    need(at % 4 == 0 || s.p[s.n - 1] >> 2 * (at % 4) == 0, "dictionary_padding"); /* REQ-DIC-006 */
}
static void read_table(Dictionary *d, Span s) {
    uint64_t codes = (uint64_t)1 << d->bits, n = 0;
    for (uint64_t c = 0; c < codes && c < s.n; n += s.p[c++]) d->longest = s.p[c] > d->longest ? s.p[c] : d->longest;
    need(s.n >= codes && s.n - codes == (n + 3) / 4, "dictionary_size");           /* REQ-DIC-011 */
    uint8_t *digits = take(n, 1);
    for (uint64_t k = 0; k < n; k++) need((digits[k] = s.p[codes + k / 4] >> 2 * (k % 4) & 3) != 3, "dictionary_symbol");
    need(n % 4 == 0 || s.p[s.n - 1] >> 2 * (n % 4) == 0, "dictionary_padding");    /* REQ-DIC-012 */
    d->phrases = take(codes, sizeof(Span)); d->phrase_set = new_set(codes);
    for (uint64_t c = 0; c < codes; digits += s.p[c++]) {
        d->phrases[c] = (Span){digits, s.p[c]};
        need(s.p[c] == 0 || add(d->phrase_set, d->phrases[c], d), "dictionary_duplicate"); /* REQ-DIC-013 */
    }
}
static void read_dictionary(Dictionary *d) {
    Span bytes = {d->tensor->bytes, d->tensor->end - d->tensor->begin};
    need(QMOE_FUZZ || crc32(0, bytes.p, bytes.n) == d->crc, "checksum");   /* REQ-CRC-002 */
    (d->table ? read_table : read_aivf)(d, bytes);
}
/* Writes the phrase of a codeword and returns its length; 0 if the codeword is unused. */
static unsigned phrase_of(const Dictionary *d, unsigned state, uint32_t code, uint8_t *phrase) {
    if (d->table && d->phrases[code].n != 0) memcpy(phrase, d->phrases[code].p, d->phrases[code].n);
    if (d->table) return (unsigned)d->phrases[code].n;
    bool low = code < d->threshold; uint64_t i = low ? code : code - d->threshold;
    if (i >= (low ? d->n_leaf[state] : d->n_incomplete[state])) return 0;
    uint32_t at = low ? d->leaf[state][i] : d->incomplete[state][i]; unsigned length = d->nodes[at].depth;
    for (; at != 0; at = d->nodes[at].parent) phrase[d->nodes[at].depth - 1] = d->nodes[at].digit;
    return length;
}
/* ---- §5 ---------------------------------------------------------------------------------------------------------------------- */
/* Would the encoder of §5.1 emit this here (REQ-ROW-001)? `ahead`: the `rest` of the row, then 255 zeros. */
static bool is_canonical(const Dictionary *d, unsigned state, uint32_t code, unsigned length, const uint8_t *ahead, uint64_t rest) {
    if (d->table) { /* not if a longer phrase fits inside the row, or a shorter one that reaches its end */
        unsigned from = length < rest ? length + 1 : (unsigned)rest, to = length < rest ? d->longest : length - 1;
        uint64_t h = hash((Span){ahead, from - 1}, 0);
        for (unsigned n = from; n <= to; n++)
            if (slot_of(d->phrase_set, (Span){ahead, n}, h = hash((Span){ahead + n - 1, 1}, h))->value != NULL) return false;
        return true;
    } /* not if the row ends at or before an incomplete node above */
    uint32_t at = code < d->threshold ? d->leaf[state][code] : d->incomplete[state][code - d->threshold];
    while ((at = d->nodes[at].parent) != 0 && d->nodes[at].depth >= rest) if (d->nodes[at].symbol == 1) return false;
    return true;
}
/* Decodes the row of `m` codewords at `bytes`; `row` is zero and has room for 255 digits more than `cols`. */
static void decode_row(const Dictionary *d, const uint8_t *bytes, uint64_t m, uint64_t cols, uint8_t *row) {
    for (int pass = 0; pass <= deep; pass++) {
        uint64_t done = 0; unsigned state = 0, length;
        for (uint64_t k = 0; k < m; k++, done += length) {
            const uint8_t *p = bytes + k * d->bits / 8;
            uint32_t code = d->bits == 8 ? *p : (uint32_t)little(p, 2) >> k * d->bits % 8 & ((1u << d->bits) - 1);
            need(done < cols, "row_overrun");                                                   /* REQ-ROW-004 */
            need((length = phrase_of(d, state, code, row + done)) != 0, "unused_codeword");     /* REQ-ROW-002 */
            canonical = canonical && (pass == 0 || is_canonical(d, state, code, length, row + done, cols - done));
            state = code >= d->threshold;
        }
        need(done >= cols, "row_underrun");                                                     /* REQ-ROW-003 */
        while (done > cols) need(row[--done] == 0, "overrun_nonzero");                          /* REQ-ROW-005 */
        need(m * d->bits % 8 == 0 || bytes[m * d->bits / 8] >> m * d->bits % 8 == 0, "row_padding"); /* REQ-ROW-006 */
    }
}
/* ---- Output ------------------------------------------------------------------------------------------------------------------ */
static const char *out_directory; /* NULL: check only */
static FILE *listing, *output; static uint64_t n_outputs;
static FILE *create(const char *name) {
    char path[PATH_MAX];
    FILE *file = snprintf(path, sizeof path, "%s/%s", out_directory, name) < (int)sizeof path ? fopen(path, "wb") : NULL;
    if (file == NULL) die(name);
    return file;
}
static void end_file(FILE **file) {
    if (*file != NULL && (fflush(*file) != 0 || ferror(*file) || fclose(*file) != 0)) die("write"); else *file = NULL;
}
static void put(const void *p, size_t n) { if (output != NULL && n != 0) fwrite(p, 1, n, output); }
static void list_text(Span s) {
    for (size_t i = 0; i < s.n; i++) fprintf(listing, s.p[i] < 0x20 || s.p[i] == '"' || s.p[i] == '\\' ? "\\u%04x" : "%c", s.p[i]);
}
static void begin_tensor(Span head, const char *number, Span tail, const Dtype *dtype, const uint64_t *shape, uint64_t rank) {
    char name[32]; end_file(&output);
    if (out_directory == NULL) return;
    snprintf(name, sizeof name, "%" PRIu64 ".bin", n_outputs); output = create(name);
    fputs(n_outputs++ != 0 ? ",\n{\"name\": \"" : "{\"name\": \"", listing);
    list_text(head); fputs(number, listing); list_text(tail);
    fprintf(listing, "\", \"dtype\": \"%s\", \"shape\": [", dtype->name);
    for (uint64_t i = 0; i < rank; i++) fprintf(listing, i != 0 ? ", %" PRIu64 : "%" PRIu64, shape[i]);
    fprintf(listing, "], \"file\": \"%s\"}", name);
}
/* ---- §6 ---------------------------------------------------------------------------------------------------------------------- */
static void check_levels(const Dtype *dtype, const uint8_t *p) {
    uint64_t v[2], sign = (uint64_t)1 << (8 * dtype->size - 1);
    for (unsigned i = 0; i < 2; i++) {
        v[i] = little(p + i * dtype->size, dtype->size);
        need((v[i] & dtype->exponent) != dtype->exponent && v[i] != sign, "level_value"); /* REQ-LEV-001 */
    }
    if (v[0] == 0 && v[1] == 0) return;
    for (int i = 0; i < 2; i++) v[i] = v[i] & sign ? sign - 1 - (v[i] & (sign - 1)) : v[i] | sign; /* ordered as the numbers are */
    need(v[0] < v[1], "level_value"); /* REQ-LEV-002 */
}
static void decode_expert(const File *f, const Group *g, uint64_t e) {
    const unsigned size = g->dtype->size, width = g->role[ROW_LENGTHS]->dtype->size;
    const uint64_t rows = g->shape[1], cols = g->shape[2];
    const uint8_t *offsets = g->role[CODE_OFFSETS]->bytes + 8 * e, *lengths = g->role[ROW_LENGTHS]->bytes + e * rows * width;
    const uint8_t *levels = g->role[LEVELS]->bytes + e * rows * 2 * size, *index = g->role[DICTIONARY_INDEX]->bytes + e;
    uint64_t begin = little(offsets, 8), n_bytes = little(offsets + 8, 8) - begin, sum = 0, total = 0, m;
    const uint8_t *codes = g->role[CODES]->bytes + begin;
    need(*index < f->n_dictionaries, "dictionary_index");                        /* REQ-GRP-011 */
    const Dictionary *d = &f->dictionaries[*index];
    need(d->bits == g->bits, "dictionary_index");                                /* REQ-GRP-012 */
    uint32_t crc = crc32(crc32(crc32(0, codes, n_bytes), lengths, rows * width), levels, rows * 2 * size);
    crc = crc32(crc32(crc, index, 1), offsets, 16);
    need(QMOE_FUZZ || crc == little(g->role[CHECKSUMS]->bytes + 4 * e, 4), "checksum");  /* REQ-CRC-001 */
    for (uint64_t r = 0; r < rows && sum <= n_bytes; r++, total += m) {          /* REQ-GRP-010 */
        m = little(lengths + r * width, width) + g->base; sum += (m * g->bits + 7) / 8;
    }
    need(sum == n_bytes, "row_lengths");
    need(rows * cols <= d->longest * total, "row_underrun");                     /* REQ-GRP-014 */
    for (uint64_t r = 0; r < rows; r++) check_levels(g->dtype, levels + r * 2 * size);
    const Block *before = blocks;
    uint8_t *row = take(rows != 0 ? cols + 255 : 0, 1), *values = take(rows != 0 ? cols : 0, size); bool zero_used = false;
    for (uint64_t r = 0; r < rows; r++, codes += (m * g->bits + 7) / 8) {
        const uint8_t *level[3] = {(const uint8_t *)"\0\0\0\0\0\0\0", levels + r * 2 * size, levels + (r * 2 + 1) * size};
        memset(row, 0, cols + 255); m = little(lengths + r * width, width) + g->base; decode_row(d, codes, m, cols, row);
        for (uint64_t i = 0; i < cols; i++) {
            zero_used = zero_used || (row[i] != 0 && little(level[row[i]], size) == 0);
            memcpy(values + i * size, level[row[i]], size);
        }
        put(values, cols * size);
    }
    need(!zero_used, "level_zero"); /* REQ-LEV-003 */
    give_back(before);
}
static void decode_group(const File *f, const Group *g) {
    const uint64_t experts = g->shape[0], rows = g->shape[1]; const Tensor *lengths = g->role[ROW_LENGTHS];
    const uint8_t *offsets = g->role[CODE_OFFSETS]->bytes;
    uint64_t least = experts * rows != 0 ? UINT64_MAX : g->base, most = 0, e = 0;
    need(little(offsets, 8) == 0 && little(offsets + 8 * experts, 8) == g->role[CODES]->shape[0], "code_offsets"); /* REQ-GRP-009 */
    for (uint64_t i = 0; i < experts; i++) need(little(offsets + 8 * i, 8) <= little(offsets + 8 * i + 8, 8), "code_offsets");
    if (!g->stacked) begin_tensor(g->source, "", g->tail, g->dtype, g->shape + g->matrix, 3u - g->matrix);
    while (!g->stacked && e < experts) decode_expert(f, g, e++);
    for (const Json *r = g->stacked ? g->ranges->first : NULL; r != NULL; r = r->next)
        for (uint64_t i = r->first->number; i < r->first->next->number; i++) {
            char number[24]; snprintf(number, sizeof number, "%" PRIu64, i);
            begin_tensor(g->source, number, g->tail, g->dtype, g->shape + 1, 2); decode_expert(f, g, e++);
        }
    for (uint64_t i = 0; deep && i < experts * rows; i++) {
        uint64_t length = little(lengths->bytes + i * lengths->dtype->size, lengths->dtype->size);
        least = length < least ? length : least; most = length > most ? length : most;
    }
    canonical = canonical && (!deep || (least == 0 && lengths->dtype->size == (most < 256 ? 1 : most < 65536 ? 2 : 4))); /* REQ-GRP-013 */
}
static void decode_contents(const File *f) {
    for (uint64_t i = 0; i < f->n_dictionaries; i++) read_dictionary(&f->dictionaries[i]);
    for (uint64_t i = 0; i < f->n_groups; i++) decode_group(f, &f->groups[i]);
    for (uint64_t i = 0; i < f->n_passthrough; i++) {
        const Tensor *t = f->passthrough[i].tensor;
        need(QMOE_FUZZ || crc32(0, t->bytes, t->end - t->begin) == f->passthrough[i].crc, "checksum"); /* REQ-CRC-003 */
        begin_tensor(t->name, "", (Span){NULL, 0}, t->dtype, t->shape, t->rank); put(t->bytes, t->end - t->begin);
    }
}
/* ---- §8 and the command line -------------------------------------------------------------------------------------------------- */
static Span map_file(const char *path) {
    struct stat info; int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) die(path);
    size_t n = (size_t)info.st_size; void *p = n == 0 ? NULL : mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED || close(fd) != 0) die(path);
    take(0, 1); blocks->size = n; blocks->map = p; return (Span){p, n};
}
static Span map_shard(const char *directory, Span name) { /* REQ-SHD-003 to REQ-SHD-005, REQ-SHD-008 */
    static char path[2 * PATH_MAX], real[PATH_MAX], home[PATH_MAX];
    struct stat info; need(name.n != 0 && !equals(name, ".") && !equals(name, ".."), "shard_path");
    for (size_t i = 0; i < name.n; i++) need(name.p[i] != '/' && name.p[i] != '\\' && name.p[i] != 0, "shard_path");
    snprintf(path, sizeof path, "%s/%.*s", directory, (int)(name.n < PATH_MAX ? name.n : PATH_MAX), (const char *)name.p);
    need(stat(path, &info) == 0, "shard_missing");
    need(S_ISREG(info.st_mode) && realpath(path, real) != NULL && realpath(directory, home) != NULL, "shard_path");
    need(strncmp(real, home, strlen(home)) == 0 && (home[1] == 0 || real[strlen(home)] == '/'), "shard_path");
    return map_file(path);
}
static void decode_directory(const char *directory) {
    char path[2 * PATH_MAX]; const Json *index = NULL, *map = NULL, *m = NULL; bool any;
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    if (access(path, F_OK) == 0) {
        Span text = map_shard(directory, word("model.safetensors.index.json")); need(text.n <= MAX_TEXT, "shard_index"); /* REQ-SHD-008 */
        map = member(index = parse(text, SHARD_INDEX, &any), "weight_map", '{', "shard_index"); /* REQ-SHD-001 */
        for (m = map->first; m != NULL; m = m->next) need(m->type == '"', "shard_index");
        for (m = index->first; m != NULL; m = m->next) need(!equals(m->key, "metadata") || m->type == '{', "shard_index");
    }
    uint64_t n = map != NULL ? map->count : 1, n_files = 0, there; File *files = take(n, sizeof(File)), *f;
    Set names = new_set(n);
    if (map == NULL) files[n_files++].bytes = map_shard(directory, word("model.safetensors"));
    for (m = map != NULL ? map->first : NULL; m != NULL; m = m->next)
        if (add(names, m->text, &files[n_files])) files[n_files++].bytes = map_shard(directory, m->text);
    for (there = 0, f = files; f < files + n_files; there += f++->n_tensors) open_file(f);
    Set tensors = new_set(there);
    for (f = files; f < files + n_files && map != NULL; f++) /* REQ-SHD-006; n_named: less those that must be named */
        for (const Tensor *t = f->tensors; t < f->tensors + f->n_tensors; t++)
            if (!begins(t->name, "qmoecodec.")) { need(add(tensors, t->name, f), "source_conflict"); f->n_named--; }
    check_sources(files, n_files);
    for (m = map != NULL ? map->first : NULL; m != NULL; m = m->next) { /* REQ-SHD-002 */
        (f = slot(names, m->text)->value)->n_named++;
        need(!begins(m->key, "qmoecodec.") && slot(f->by_name, m->key)->value != NULL, "shard_mismatch");
    }
    for (f = files; f < files + n_files; f++) need(f->n_named == 0, "shard_mismatch");
    for (f = files; f < files + n_files; f++) decode_contents(f);
}
static bool decode(const char *in, Span bytes) { /* `in` NULL: the bytes */
    struct stat info; reason = NULL; canonical = true;
    if (setjmp(rejected) == 0) {
        if (in != NULL && stat(in, &info) != 0) die(in);
        File f = {.bytes = in == NULL || S_ISDIR(info.st_mode) ? bytes : map_file(in)};
        if (in != NULL && S_ISDIR(info.st_mode)) decode_directory(in); else { open_file(&f); decode_contents(&f); }
        need(canonical, "not_canonical");
    }
    end_file(&output); give_back(NULL);
    return reason == NULL;
}
#if QMOE_FUZZ
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { deep = true; decode(NULL, (Span){data, size}); return 0; }
#else
static int run(const char *in, const char *out) { /* prints the verdict as one line of JSON */
    out_directory = out; n_outputs = 0;
    mkdir(out, 0777); fputs("[", listing = create("tensors.json")); bool accepted = decode(in, (Span){NULL, 0});
    fputs("]\n", listing); end_file(&listing);
    if (accepted) printf("{\"accepted\": %" PRIu64 "}\n", n_outputs);
    else printf("{\"error\": \"%s\"}\n", reason);
    return fflush(stdout) == 0 ? !accepted : 3;
}
int main(int argc, char **argv) {
    static char line[3 * PATH_MAX]; bool serve = argc == 2 && strcmp(argv[1], "serve") == 0;
    if (serve) puts("{\"protocol\": 1, \"name\": \"qmoe_decode.c\"}"), fflush(stdout);
    while (serve) {
        if (fgets(line, sizeof line, stdin) == NULL) return 0;
        const char *command = strtok(line, "\t\n"), *in = strtok(NULL, "\t\n"), *out = strtok(NULL, "\t\n");
        deep = strtok(NULL, "\t\n") != NULL;
        if (out == NULL || strcmp(command, "decode") != 0 || run(in, out) == 3) return 3;
    }
    deep = argc == 6 && strcmp(argv[5], "--deep") == 0;
    if ((argc == 5 || deep) && strcmp(argv[1], "decode") == 0 && strcmp(argv[3], "--out") == 0) return run(argv[2], argv[4]);
    fprintf(stderr, "usage: %s decode IN --out DIR [--deep] | serve\n", argv[0]);
    return 2;
}
#endif
