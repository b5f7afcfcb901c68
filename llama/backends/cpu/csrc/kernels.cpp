// The functions that Python calls (ops.py) are extern "C", here and in the headers: one translation unit, one library.
#include "elementwise.h"
#include "gemm.h"
#include "layers.h"
#include "pack.h"

static thread_local Activations activations;

// The extensions of the instruction set that this library was compiled for, by Linux's names for them.
extern "C" const char *instructions() {
    return ""
#if defined(__AVX2__)
           " avx2"
#endif
#if defined(__FMA__)
           " fma"
#endif
#if defined(__F16C__)
           " f16c"
#endif
#if defined(__BMI2__)
           " bmi2"
#endif
#if defined(__AVXVNNI__)
           " avx_vnni"
#endif
#if defined(__AVX512F__)
           " avx512f"
#endif
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
           " avx512bw avx512dq avx512vl"
#endif
#if defined(__AVX512VBMI__)
           " avx512vbmi"
#endif
#if defined(__AVX512VNNI__)
           " avx512_vnni"
#endif
#if defined(__AVX512BF16__)
           " avx512_bf16"
#endif
#if defined(__AVX512FP16__)
           " avx512_fp16"
#endif
#if defined(__AMX_BF16__)
           " amx_tile amx_bf16"
#endif
#if defined(__ARM_FEATURE_ATOMICS)
           " atomics"
#endif
#if defined(__ARM_FEATURE_DOTPROD)
           " asimddp"
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
           " i8mm"
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
           " bf16"
#endif
#if defined(__ARM_FEATURE_SVE)
           " sve"
#endif
        ;
}

// Runs layers [first, stop), or a half of each, in place on the residual in.x; see LayersInput.
extern "C" void run_layers(const Layer *layers, int first, int stop, int halves, const LayersInput *inputs) {
    static thread_local std::vector<float> q_storage, parts_storage, hidden_storage;
    const LayersInput &in = *inputs;
    int first_part[MAX_FEW_TOKENS + 1] = {};
    for (int t = 0; t < in.n_tokens; t++) first_part[t + 1] = first_part[t] + Keys(in, t).parts();
    float *q = buffer(q_storage, size_t(in.n_tokens) * in.n_heads * in.head_dim);
    float *parts = buffer(parts_storage, size_t(first_part[in.n_tokens]) * in.n_heads * (in.head_dim + 2));
    float *hidden = buffer(hidden_storage, size_t(in.n_tokens) * in.hidden_dim);
    Team team;
    parallel(in.threads, [&](int thread, int size) {
        Worker worker{in, team, thread, size, q, parts, hidden, first_part, activations};
        for (int layer = first; layer < stop; layer++) {
            if (halves & ATTENTION) worker.attention(layers[layer], layer);
            if (halves & FEED_FORWARD) worker.feed_forward(layers[layer]);
        }
    });
}

// Tells whether all pages are in the cache, and all positions in the pages of their rows.
extern "C" int is_within_cache(const LayersInput *inputs) {
    const LayersInput &in = *inputs;
    const uint64_t capacity = uint64_t(in.pages_per_row) * PAGE_SIZE;
    bool within = true;
    for (size_t i = 0; i < size_t(in.n_rows) * in.pages_per_row; i++)
        within &= uint32_t(in.page_table[i]) < uint32_t(in.n_pages);
    for (int t = 0; t < in.n_tokens; t++)
        within &= uint32_t(in.rows[t]) < uint32_t(in.n_rows) && uint64_t(in.positions[t]) < capacity;
    return within;
}

// Attention of tokens [first, first + n) over a layer's cache: y, like q (n_tokens, n_heads, head_dim). Both have the
// cache's type. No thread waits for another, as tokens of many rows are enough for all.
extern "C" void attend(const LayersInput *inputs, int layer, int first, int n, void *q) {
    const LayersInput &in = *inputs;
    const int group = in.n_heads / in.n_kv_heads, values = group * in.head_dim, width = in.head_dim + 2;
    std::atomic<int> next{0};
    parallel(in.threads, [&](int, int) {
        std::vector<float> heads(values), parts;
        for (int unit; (unit = next++) < n * in.n_kv_heads;) {
            const int t = first + unit / in.n_kv_heads, head = unit % in.n_kv_heads;
            const size_t at = (size_t(t) * in.n_kv_heads + head) * values;
            const Keys keys(in, t);
            buffer(parts, size_t(keys.parts()) * group * width);
            read_floats(q, in.cache_type, at, values, heads.data());
            for (int part = 0; part < keys.parts(); part++)
                attend_token(in, layer, t, head, keys, part, heads.data(), parts.data() + part * group * width);
            for (int h = 0; h < group; h++)
                merge_parts(
                    parts.data() + h * width, keys.parts(), size_t(group) * width, in.head_dim,
                    heads.data() + h * in.head_dim
                );
            write_floats(q, in.cache_type, at, values, heads.data());
        }
    });
}

// Looks up packed rows by index: (n, columns).
extern "C" void embedding(const Weight *weight, const int64_t *rows, int n, float *to, int threads) {
    const Weight &w = *weight;
    parallel_for(n > MAX_FEW_TOKENS ? threads : 1, n, [&](int i) {
        unpack_tile(
            w.type, w.data + size_t(rows[i] / TILE) * tile_bytes(w.type, w.columns), w.columns,
            [&](int column, f32 values) { to[size_t(i) * w.columns + column] = values[rows[i] % TILE]; }
        );
    });
}

// y (n, rows) = x (n, columns) times the weight transposed, plus its bias; x and y are floats of their types.
extern "C" void multiply(const Weight *weight, const void *x, int n, int x_type, void *y, int y_type, int threads) {
    static thread_local std::vector<float> values_storage;
    static thread_local std::vector<uint8_t> rounded_storage;
    constexpr int AT_ONCE = 512;  // tokens
    const Weight &w = *weight;
    float *values = x_type == F32 ? (float *)x : buffer(values_storage, size_t(n) * w.columns);
    uint8_t *rounded = w.is_packed() ? buffer(rounded_storage, n * rounded_bytes(w.columns)) : nullptr;
    const Input input{values, rounded, w.columns, n};
    Team team;
    parallel(threads, [&](int thread, int size) {
        const Share batches((n + 7) / 8, thread, size);
        for (int first = batches.start * 8; first < batches.stop * 8; first += 8) {
            const int stop = std::min(n, first + 8);
            const size_t at = size_t(first) * w.columns;
            if (x_type != F32) read_floats(x, x_type, at, (stop - first) * w.columns, values + at);
            if (rounded) round_activations(values, w.columns, first, stop, rounded);
        }
        team.wait(size);
        std::vector<float> products(std::min(n, AT_ONCE) * TILE);
        const Share share((w.rows + TILE - 1) / TILE, thread, size);
        for (int tile = share.start; tile < share.stop; tile++)
            for (int first = 0; first < n; first += AT_ONCE) {
                const Input part = input.tokens(first, std::min(n, first + AT_ONCE));
                const int rows = std::min(TILE, w.rows - tile * TILE);
                gemv_tile(w, tile, part, products.data());
                for (int t = 0; t < part.n; t++) {
                    const size_t at = size_t(first + t) * w.rows + tile * TILE;
                    write_floats(y, y_type, at, rows, products.data() + t * TILE);
                }
            }
    });
}
