// Attention over pages of the cache, in parts of PART keys, by tokens of one row together.
//
// A part begins at a multiple of PART; each gives a token's greatest score, its sum of exponentials and its weighted sum
// of values, and these are merged in order. Neither threads nor the tokens that share a block change what is computed
// for a token: see D30.
#pragma once
#include "norms.h"
#include "panels.h"
#include "threads.h"

constexpr int PAGE_SIZE = 16;  // positions of a page of the cache, as in cache.py
constexpr int PART = 256;  // keys
constexpr int PANEL_KEYS = 64;  // of whole pages: keys or values that are made a panel at once, within a core's L1 cache

inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// The slot of a position of a row: its place among the positions of all pages.
inline size_t slot(const int32_t *pages, int64_t position) {
    return size_t(pages[position / PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE;
}

// Memory of whole cache lines.
class Lines {
    struct alignas(64) Line {
        float values[LANES];
    };
    std::vector<Line> lines;

public:
    float *room(size_t n) {
        if (lines.size() * LANES < n) lines.resize((n + LANES - 1) / LANES);
        return (float *)lines.data();
    }
};

// What adjacent KV heads of a row have in the cache. keys, values: of slot 0 and the first head; those of the next slot
// are `stride` bytes on.
struct CachedHeads {
    const uint8_t *keys, *values;
    int type, head_dim, heads;
    size_t stride;
    const int32_t *pages;

    int head_bytes() const { return head_dim * value_bytes(type); }
    const uint8_t *at(const uint8_t *from, int position) const { return from + slot(pages, position) * stride; }

    // The cache lines of a head's share of positions [start, stop) of all heads, over `rounds` rounds. Where all heads of
    // the cache are read together, memory is so read in its order.
    Ahead ahead(const uint8_t *from, int start, int stop, int head, int rounds, std::vector<const uint8_t *> &room) const {
        const Share share(std::max(0, stop - start), head, heads);
        const int bytes = heads * head_bytes(), lines = (bytes + 63) / 64, n = (share.stop - share.start) * lines;
        const int rate = (n + rounds - 1) / rounds;
        if (rate == 0) return {};
        room.resize(std::max(room.size(), size_t(rate) * rounds));
        const uint8_t **to = room.data();
        for (int position = start + share.start; position < start + share.stop; position++) {
            const uint8_t *row = at(from, position);
            for (int line = 0; line < lines; line++) *to++ = row + line * 64;
        }
        std::fill(to, room.data() + rate * rounds, to[-1]);
        return {room.data(), rate};
    }
};

// Which keys a query sees: those of a window that ends with it, and those of its chunk.
struct Sight {
    int64_t window, chunk;  // keys; 0: all

    int first_key(int64_t position) const {
        const int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
        return int(chunk ? std::max(first, position / chunk * chunk) : first);
    }
    bool operator==(const Sight &other) const { return window == other.window && chunk == other.chunk; }
};

// The query heads of these KV heads of n tokens at successive positions, each of `words` words: for each KV head rows
// t * group + h.
struct Queries {
    const float *values;
    int group, n, words;
    int64_t position;  // of the first token
    Sight sight;

    int rows() const { return n * group; }  // of a KV head
    int first_key(int row) const { return sight.first_key(position + row / group); }
    int stop_key(int row) const { return int(position) + row / group + 1; }
    int first_part() const { return first_key(0) / PART; }
    int stop_part() const { return (stop_key(rows() - 1) - 1) / PART + 1; }
};

// A result is the greatest score and the sum of exponentials, in a cache line, and the weighted sum of values.
inline int result_size(int head_dim) { return LANES + padded(head_dim); }
inline float score_scale(int head_dim) { return 1.44269504f / std::sqrt(float(head_dim)); }  // of exponents of 2

// Turns the keys of a page to 16 columns of a panel, to[word][key], as Op multiplies them; TYPE is the cache's.
template <class Op, int TYPE> inline void turn_page(const uint8_t *page, size_t stride, int head_dim, float *to) {
    const int words = head_dim * value_bytes(TYPE) / 4;
    alignas(64) uint8_t small[PAGE_SIZE][16] = {};
    if (words < 4) {
        for (int key = 0; key < PAGE_SIZE; key++) memcpy(small[key], page + key * stride, words * 4);
        page = small[0], stride = sizeof small[0];
    }
    for (int group = 0; group < words; group += 4) {
        const int word = std::max(0, std::min(group, words - 4));  // the last group may overlap the one before it
        for (int key = 0; key < PAGE_SIZE; key += NATIVE) {
            native_words turned[4];
            turn(page + word * 4 + key * stride, stride, turned);
            auto put = [&](int row, auto v) { memcpy(to + row * PANEL_KEYS + key, &v, sizeof v); };
            for (int i = 0; i < 4; i++) {
                if (TYPE == F32 || Op::PER_WORD == 2) {
                    put(word + i, turned[i]);
                } else if (TYPE == BF16) {
                    put(2 * (word + i), turned[i] << 16);
                    put(2 * (word + i) + 1, turned[i] & 0xffff0000);
                } else {
                    put(2 * (word + i), from_halves(turned[i] & 0xffff));
                    put(2 * (word + i) + 1, from_halves(turned[i] >> 16));
                }
            }
        }
    }
}

// Rows of a page's values as a panel's: of one key, or of pairs of keys whose values are interleaved.
template <class Op>
inline void copy_values(const CachedHeads &cached, const uint8_t *page, int n, float *to, int width) {
    for (int key = 0; key < n; key += Op::PER_WORD, to += width) {
        const uint8_t *from = page + key * cached.stride;
        if constexpr (Op::PER_WORD == 1) {
            read_floats(from, cached.type, 0, cached.head_dim, to);
        } else {
            for (int i = 0; i < cached.head_dim; i += NATIVE) {
                const size_t size = std::min(NATIVE, cached.head_dim - i) * 2;
                native_halves even{}, odd{};
                auto read = [&](native_halves &v, const uint8_t *from) {
                    if (size == sizeof v) v = load<native_halves>(from);
                    else memcpy(&v, from, size);
                };
                read(even, from + i * 2);
                if (key + 1 < n) read(odd, from + cached.stride + i * 2);
                native_words both = widened(even) | widened(odd) << 16;
                memcpy(to + i, &both, sizeof both);
            }
        }
    }
}

// Values that are multiplied where they lie in pages, from position `first` on; `from` are those of slot 0.
template <class T> struct PagedValues {
    const CachedHeads &cached;
    const uint8_t *from;
    int first;
    const T *row(int i) const { return (const T *)cached.at(from, first + i); }
    static native values(const T *row) { return native_floats(row); }
};

// Makes weights of a row's scores [from, to): 0 but for the keys [first, stop). Returns the greatest score and the sum of
// weights in result[0] and result[1].
template <class Op>
__attribute__((noinline)) void weigh(float *scores, int from, int to, int first, int stop, float scale, float *result) {
    static const int32_t LANE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32 none = all(-INFINITY);
    f32 most = none, total{};
    for (int i = from; i < to; i += LANES) {
        f32 v = load<f32>(scores + i);
        if (i < first || i + LANES > stop) {
            const i32 key = load<i32>(LANE) + i;
            v = pick(key < stop, pick(key < first, none, v), none);
            store(scores + i, v);
        }
        most = pick(most < v, v, most);
    }
    float greatest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) greatest = greatest < most[lane] ? most[lane] : greatest;
    const float offset = greatest == -INFINITY ? 0.0f : greatest * scale;
    for (int i = from; i < to; i += LANES) {
        f32 weights = power_of_two(load<f32>(scores + i) * scale - offset);
        if (Op::PER_WORD == 1) {
            store(scores + i, weights);
        } else {
            u16 rounded = to_bf16(weights);
            memcpy((uint16_t *)scores + i, &rounded, sizeof rounded);
            weights = from_bf16(rounded);
        }
        total += weights;
    }
    result[0] = greatest;
    result[1] = sum(total);
}

// A thread's memory for a part.
struct PartMemory {
    Lines panel, scores;
    std::vector<const uint8_t *> lines;
};

// Keys that will be read after a part.
struct Following {
    CachedHeads cached;
    int start, stop;
};

// Computes the results of all rows of `queries` over a part of their keys, result_size apart: see above.
template <class Op>
inline void attend_part(
    const CachedHeads &cached, const Queries &queries, int part, const Following &following, PartMemory &memory,
    float *results
) {
    const int rows = queries.rows(), width = padded(cached.head_dim), size = LANES + width, base = part * PART;
    const int first = std::max(base, queries.first_key(0)) / PAGE_SIZE * PAGE_SIZE;
    const int stop = std::min(base + PART, queries.stop_key(rows - 1)), padded_stop = padded(stop);
    const float scale = score_scale(cached.head_dim);
    float *panel = memory.panel.room(size_t(PANEL_KEYS) * width);
    float *scores = memory.scores.room(size_t(cached.heads) * rows * PART);
    for (int key = first; key < stop; key += PANEL_KEYS) {
        const int n = std::min(PANEL_KEYS, padded_stop - key), next = key + PANEL_KEYS;
        for (int head = 0; head < cached.heads; head++) {
            const bool is_last = next >= stop;  // values are next
            const int start = is_last ? first : next;
            const Ahead ahead = cached.ahead(
                is_last ? cached.values : cached.keys, start, std::min(stop, start + PANEL_KEYS), head, queries.words,
                memory.lines
            );
            const uint8_t *keys = cached.keys + head * cached.head_bytes();
            for (int i = 0; i < n; i += PAGE_SIZE) {
                const uint8_t *page = cached.at(keys, key + i);
                switch (cached.type) {
                    case F32: turn_page<Op, F32>(page, cached.stride, cached.head_dim, panel + i); break;
                    case BF16: turn_page<Op, BF16>(page, cached.stride, cached.head_dim, panel + i); break;
                    default: turn_page<Op, F16>(page, cached.stride, cached.head_dim, panel + i);
                }
            }
            multiply_panel<Op>(
                queries.values + size_t(head) * rows * queries.words, rows, queries.words, Panel{panel, PANEL_KEYS},
                queries.words, n, scores + size_t(head) * rows * PART + key - base, PART, false, ahead
            );
        }
    }
    for (int r = 0; r < cached.heads * rows; r++)
        weigh<Op>(
            scores + size_t(r) * PART, first - base, padded_stop - base, queries.first_key(r % rows) - base,
            queries.stop_key(r % rows) - base, scale, results + size_t(r) * size
        );
    const bool in_place = Op::PER_WORD == 1 && rows <= TILE_QUERIES && width == cached.head_dim && cached.type != F16;
    for (int key = first; key < stop; key += PANEL_KEYS) {
        const int n = std::min(PANEL_KEYS, stop - key), words = (n + Op::PER_WORD - 1) / Op::PER_WORD;
        const int next = key + PANEL_KEYS;
        for (int head = 0; head < cached.heads; head++) {
            const Ahead ahead =
                next < stop
                    ? cached.ahead(cached.values, next, std::min(stop, next + PANEL_KEYS), head, words, memory.lines)
                    : following.cached.ahead(
                          following.cached.keys, following.start,
                          std::min(following.stop, following.start + PANEL_KEYS), head, words, memory.lines
                      );
            const uint8_t *from = cached.values + head * cached.head_bytes();
            auto multiply = [&](const auto &values) {
                multiply_panel<Op>(
                    scores + size_t(head) * rows * PART + (key - base) / Op::PER_WORD, rows, PART, values,
                    words, width, results + size_t(head) * rows * size + LANES, size,
                    key != first, ahead
                );
            };
            if (in_place && cached.type == F32) {
                multiply(PagedValues<float>{cached, from, key});
            } else if (in_place) {
                multiply(PagedValues<Bf16>{cached, from, key});
            } else {
                for (int i = 0; i < n; i += PAGE_SIZE)
                    copy_values<Op>(
                        cached, cached.at(from, key + i), std::min(PAGE_SIZE, n - i), panel + i / Op::PER_WORD * width,
                        width
                    );
                multiply(Panel{panel, size_t(width)});
            }
        }
    }
}

// Begins a state that results are merged to; it has the form of a result.
inline void clear_result(float *state, int head_dim) {
    std::fill(state, state + result_size(head_dim), 0.0f);
    state[0] = -INFINITY;
}

// Merges the result of a head's next part.
__attribute__((noinline)) inline void merge(float *state, const float *result, int head_dim) {
    if (result[0] == -INFINITY) return;  // no key of this part is seen
    const float greatest = std::max(state[0], result[0]);
    f32 weights{};
    weights[0] = state[0], weights[1] = result[0];
    weights = power_of_two((weights - greatest) * score_scale(head_dim));
    const float before = weights[0], now = weights[1];
    state[0] = greatest;
    state[1] = state[1] * before + result[1] * now;
    for (int i = LANES; i < result_size(head_dim); i += LANES)
        store(state + i, load<f32>(state + i) * before + load<f32>(result + i) * now);
}

// y (head_dim): the attention that a state stands for.
inline void finish(const float *state, int head_dim, float *y) {
    for (int i = 0; i < head_dim; i++) y[i] = state[LANES + i] / state[1];
}
