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

// Runs layers [first, stop), or parts of each, in place on the residual in.x; see LayersInput.
extern "C" void run_layers(const Layer *layers, int first, int stop, int parts, const LayersInput *inputs) {
    static thread_local std::vector<float> q_storage, k_storage, hidden_storage, added_storage, score_storage, low_storage;
    static thread_local Lines result_storage;
    const LayersInput &in = *inputs;
    std::vector<AttentionPlan> plans;  // of each sight
    std::vector<int> plan_of;  // each layer
    size_t results = 0;
    int experts = 0, ranks = 0;  // the most of a layer; of adapters, those of all its weights
    for (int layer = first; layer < stop; layer++) {
        ranks = std::max(ranks, ranks_of(layers[layer]));
        if (layers[layer].experts) experts = std::max(experts, layers[layer].experts->n);
        size_t i = 0;
        while (i < plans.size() && !(plans[i].sight == layers[layer].sight)) i++;
        if (i == plans.size()) plans.emplace_back(in, layers[layer].sight);
        plan_of.push_back(int(i));
        results = std::max(results, plans[i].results.back());
    }
    const size_t n = in.n_tokens;
    Team team;
    float *q = in.q ? in.q : buffer(q_storage, n * in.n_heads * in.head_dim);
    float *k = in.k ? in.k : buffer(k_storage, n * in.n_kv_heads * in.head_dim);
    float *result_room = result_storage.room(results * result_size(in.head_dim));
    float *hidden = buffer(hidden_storage, n * in.hidden_dim), *added = buffer(added_storage, n * in.dim);
    float *scores = buffer(score_storage, n * experts), *low = buffer(low_storage, n * ranks);
    parallel(in.threads, [&](int thread, int size) {
        const Worker worker{in, team, thread, size, q, k, result_room, hidden, added, scores, low, activations};
        AttentionHalf attention{worker};
        FeedForwardHalf feed_forward{worker};
        for (int layer = first; layer < stop; layer++) {
            if (parts & PROJECTION) attention.project(layers[layer], layer);
            if (parts & ATTENTION) attention.run(layers[layer], layer, plans[plan_of[layer - first]]);
            if (parts & FEED_FORWARD) feed_forward.run(layers[layer]);
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

// Attention of a block's query heads of one KV head over a layer's cache, in place of q.
template <class Op>
static void attend_block(
    const LayersInput &in, const Sight &sight, int layer, const TokenBlock &block, int head, void *q
) {
    static thread_local PartMemory memory;
    static thread_local Lines query_storage, result_storage;
    const CachedHeads cached = cached_heads(in, layer, block, head, 1);
    const Queries queries = block_queries<Op>(in, sight, block, head, 1, q, in.cache_type, query_storage);
    const int rows = queries.rows(), size = result_size(in.head_dim);
    float *results = result_storage.room(size_t(rows) * size * 2), *states = results + size_t(rows) * size;
    for (int r = 0; r < rows; r++) clear_result(states + size_t(r) * size, in.head_dim);
    for (int part = queries.first_part(); part < queries.stop_part(); part++) {
        const Following following{cached, (part + 1) * PART, queries.stop_key(rows - 1)};
        attend_part<Op>(cached, queries, part, following, memory, results);
        for (int r = 0; r < rows; r++) merge(states + size_t(r) * size, results + size_t(r) * size, in.head_dim);
    }
    for (int r = 0; r < rows; r++) {
        const int token = block.first + r / queries.group, index = head * queries.group + r % queries.group;
        finish(states + size_t(r) * size, in.head_dim, results);
        write_floats(q, in.cache_type, (size_t(token) * in.n_heads + index) * in.head_dim, in.head_dim, results);
    }
}

// Attention of tokens over a layer's cache: y, like q (n_tokens, n_heads, head_dim). Both have the cache's type; where
// that is bf16, and the processor multiplies pairs of bf16, so are the weights of values. No thread waits for another:
// the last blocks, which have the most keys, begin first.
extern "C" void attend(const Layer *layers, int layer, const LayersInput *inputs, void *q) {
    constexpr int QUERIES = 60;  // of a block: ten tiles for each panel that is made
    const LayersInput &in = *inputs;
    const std::vector<TokenBlock> blocks = token_blocks(in, QUERIES);
    std::atomic<int> next{0};
    parallel(in.threads, [&](int, int) {
        for (int unit; (unit = next++) < int(blocks.size()) * in.n_kv_heads;) {
            const TokenBlock &block = blocks[blocks.size() - 1 - unit / in.n_kv_heads];
            const int head = unit % in.n_kv_heads;
#if defined(HAS_BF16_PAIRS)
            if (in.cache_type == BF16) {
                attend_block<Bf16Pairs>(in, layers[layer].sight, layer, block, head, q);
                continue;
            }
#endif
            attend_block<Fp32>(in, layers[layer].sight, layer, block, head, q);
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

// y (n, rows) = x (n, columns) times the weight transposed, plus its bias; x and y are floats of their types. The tokens
// are taken some at a time, so that what is kept of them stays small; the weight is read once for each time.
extern "C" void multiply(const Weight *weight, const void *x, int n, int x_type, void *y, int y_type, int threads) {
    static thread_local std::vector<float> values_storage;
    static thread_local std::vector<uint8_t> rounded_storage;
    constexpr int AT_ONCE = 512;  // tokens, a multiple of MAX_BATCH
    const Weight &w = *weight;
    const int most = std::min(n, AT_ONCE);
    float *values = x_type == F32 ? nullptr : buffer(values_storage, size_t(most) * w.columns);
    uint8_t *rounded = w.is_packed() ? buffer(rounded_storage, most * rounded_bytes(w.columns)) : nullptr;
    Team team;
    parallel(threads, [&](int thread, int size) {
        std::vector<float> products(most * TILE);
        for (int first = 0; first < n; first += AT_ONCE) {
            const int stop = std::min(n, first + AT_ONCE);
            const size_t at = size_t(first) * w.columns;
            const Input part{values ? values : (const float *)x + at, rounded, w.columns, stop - first};
            const Share batches((part.n + MAX_BATCH - 1) / MAX_BATCH, thread, size);
            for (int batch = batches.start; batch < batches.stop; batch++) {
                const int t = batch * MAX_BATCH, count = std::min(MAX_BATCH, part.n - t);
                const size_t place = size_t(t) * w.columns;
                if (values) read_floats(x, x_type, at + place, count * w.columns, values + place);
                if (rounded) round_activations(part.values, w.columns, t, t + count, rounded);
            }
            team.wait(size);
            const Share share((w.rows + TILE - 1) / TILE, thread, size);
            for (int tile = share.start; tile < share.stop; tile++) {
                const int rows = std::min(TILE, w.rows - tile * TILE);
                gemv_tile(w, tile, part, products.data());
                for (int t = 0; t < part.n; t++)
                    write_floats(y, y_type, size_t(first + t) * w.rows + tile * TILE, rows, products.data() + t * TILE);
            }
            if (stop < n) team.wait(size);
        }
    });
}

// Adds to y (n, rows) the products of x (n, columns) with adapters; x and y are floats of their types.
extern "C" void add_low_rank(
    const LowRank *adapters, int rows, const void *x, int n, int x_type, void *y, int y_type, int threads
) {
    constexpr int AT_ONCE = 12;  // tokens of a unit of work
    const LowRank &w = *adapters;
    const int columns = w.a.columns;
    parallel(threads, [&](int thread, int size) {
        std::vector<float> values(size_t(AT_ONCE) * columns), low(size_t(AT_ONCE) * w.a.rows);
        float added[AT_ONCE * TILE], sums[TILE];
        const Share share((n + AT_ONCE - 1) / AT_ONCE, thread, size);
        for (int unit = share.start; unit < share.stop; unit++) {
            const int first = unit * AT_ONCE, count = std::min(AT_ONCE, n - first);
            read_floats(x, x_type, size_t(first) * columns, count * columns, values.data());
            low_rank_input(w, {values.data(), nullptr, columns, count}, low.data());
            for (int row = 0; row < rows; row += TILE) {
                low_rank_tile(w, row / TILE, low.data(), count, added);
                const int wide = std::min(TILE, rows - row);
                for (int t = 0; t < count; t++) {
                    const size_t at = size_t(first + t) * rows + row;
                    read_floats(y, y_type, at, wide, sums);
                    for (int r = 0; r < wide; r++) sums[r] += added[t * TILE + r];
                    write_floats(y, y_type, at, wide, sums);
                }
            }
        }
    });
}
