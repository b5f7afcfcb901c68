// What Python calls (ops.py), beside the functions that headers declare extern "C": one library of them all.
#include "gemm.h"
#include "many.h"
#include "pack.h"
#include "step.h"

static thread_local Prepared prepared;

extern "C" void run_layers(const Layer *layers, int first, int stop, int halves, const LayersInput *step) {
    static thread_local std::vector<float> kept_q, kept_parts, kept_hidden;
    const LayersInput &s = *step;
    int max_parts = 1;
    for (int t = 0; t < s.n_tokens; t++) {
        int64_t start = std::max<int64_t>(0, s.positions[t] - s.window + 1);
        max_parts = std::max(max_parts, int(s.positions[t] / PART - start / PART + 1));
    }
    float *q = buffer(kept_q, size_t(s.n_tokens) * s.n_heads * s.head_dim);
    float *parts = buffer(kept_parts, size_t(s.n_tokens) * s.n_heads * max_parts * (s.head_dim + 2));
    float *hidden = buffer(kept_hidden, size_t(s.n_tokens) * s.hidden_dim);
    Team team(s.threads);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp single
        team.size = omp_get_num_threads();
        Work work{s, team, omp_get_thread_num(), q, parts, hidden, max_parts, prepared};
        for (int layer = first; layer < stop; layer++) {
            if (halves & ATTENTION) work.attention(layers[layer], layer);
            if (halves & FEED_FORWARD) work.feed_forward(layers[layer]);
        }
    }
}

// Packed rows [first, first + n) in the columns of a matrix (columns, n) of floats; first is a tile's.
extern "C" void unpack(const Weight *weight, int first, int n, void *to, int type, int threads) {
    const Weight &w = *weight;
#pragma omp parallel for num_threads(threads)
    for (int tile = 0; tile < (n + TILE - 1) / TILE; tile++) {
        const uint8_t *from = w.data + (size_t(first / TILE) + tile) * tile_bytes(w.type, w.columns);
        const int rows = std::min(TILE, n - tile * TILE);
        unpacked_tile(w.type, from, w.columns, [&](int column, f32 values) {
            float sixteen[TILE];
            store(sixteen, values);
            write_floats(to, type, size_t(column) * n + tile * TILE, rows, sixteen);
        });
    }
}

// Packed rows of the given numbers, (n, columns).
extern "C" void embedding(const Weight *weight, const int64_t *rows, int n, float *to, int threads) {
    const Weight &w = *weight;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < n; i++)
        unpacked_tile(
            w.type, w.data + size_t(rows[i] / TILE) * tile_bytes(w.type, w.columns), w.columns,
            [&](int column, f32 values) { to[size_t(i) * w.columns + column] = values[rows[i] % TILE]; }
        );
}

// y (n, rows) = x (n, columns) times the weight, and its bias.
extern "C" void gemv(const Weight *weight, const float *x, int n, float *y, int threads) {
    const Weight &w = *weight;
#pragma omp parallel num_threads(threads)
    {
        Input input = prepared.made(x, n, w.columns);
        float made[MAX_GEMV_TOKENS * TILE];
        Share share((w.rows + TILE - 1) / TILE, omp_get_thread_num(), omp_get_num_threads());
        for (int tile = share.start; tile < share.stop; tile++) {
            multiply(w, tile, input, n, made);
            int rows = std::min(TILE, w.rows - tile * TILE);
            for (int t = 0; t < n; t++) memcpy(y + size_t(t) * w.rows + tile * TILE, made + t * TILE, rows * 4);
        }
    }
}
