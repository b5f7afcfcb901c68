// The functions that Python calls (ops.py) are extern "C", here and in the headers: one translation unit, one library.
#include "elementwise.h"
#include "gemm.h"
#include "layers.h"
#include "pack.h"

static thread_local Activations activations;

// Runs layers [first, stop), or a half of each, in place on the residual in.x; see LayersInput.
extern "C" void run_layers(const Layer *layers, int first, int stop, int halves, const LayersInput *inputs) {
    static thread_local std::vector<float> q_storage, parts_storage, hidden_storage;
    const LayersInput &in = *inputs;
    int max_parts = 1;
    for (int t = 0; t < in.n_tokens; t++) {
        int64_t start = std::max<int64_t>(0, in.positions[t] - in.window + 1);
        max_parts = std::max(max_parts, int(in.positions[t] / PART - start / PART + 1));
    }
    float *q = buffer(q_storage, size_t(in.n_tokens) * in.n_heads * in.head_dim);
    float *parts = buffer(parts_storage, size_t(in.n_tokens) * in.n_heads * max_parts * (in.head_dim + 2));
    float *hidden = buffer(hidden_storage, size_t(in.n_tokens) * in.hidden_dim);
    Team team(in.threads);
#pragma omp parallel num_threads(in.threads)
    {
#pragma omp single
        team.size = omp_get_num_threads();
        Worker worker{in, team, omp_get_thread_num(), q, parts, hidden, max_parts, activations};
        for (int layer = first; layer < stop; layer++) {
            if (halves & ATTENTION) worker.attention(layers[layer], layer);
            if (halves & FEED_FORWARD) worker.feed_forward(layers[layer]);
        }
    }
}

// Dequantizes packed rows [first, first + n) to the columns of a matrix (columns, n) of floats; `first` begins a tile.
extern "C" void unpack(const Weight *weight, int first, int n, void *to, int type, int threads) {
    const Weight &w = *weight;
#pragma omp parallel for num_threads(threads)
    for (int tile = 0; tile < (n + TILE - 1) / TILE; tile++) {
        const uint8_t *from = w.data + (size_t(first / TILE) + tile) * tile_bytes(w.type, w.columns);
        const int rows = std::min(TILE, n - tile * TILE);
        unpack_tile(w.type, from, w.columns, [&](int column, f32 values) {
            float sixteen[TILE];
            store(sixteen, values);
            write_floats(to, type, size_t(column) * n + tile * TILE, rows, sixteen);
        });
    }
}

// Looks up packed rows by index: (n, columns).
extern "C" void embedding(const Weight *weight, const int64_t *rows, int n, float *to, int threads) {
    const Weight &w = *weight;
#pragma omp parallel for num_threads(threads) if (n > MAX_GEMV_TOKENS)
    for (int i = 0; i < n; i++)
        unpack_tile(
            w.type, w.data + size_t(rows[i] / TILE) * tile_bytes(w.type, w.columns), w.columns,
            [&](int column, f32 values) { to[size_t(i) * w.columns + column] = values[rows[i] % TILE]; }
        );
}

// y (n, rows) = x (n, columns) times the weight transposed, plus its bias.
extern "C" void gemv(const Weight *weight, const float *x, int n, float *y, int threads) {
    const Weight &w = *weight;
#pragma omp parallel num_threads(threads)
    {
        Input input = activations.with_sums(x, n, w.columns);
        float products[MAX_GEMV_TOKENS * TILE];
        Share share((w.rows + TILE - 1) / TILE, omp_get_thread_num(), omp_get_num_threads());
        for (int tile = share.start; tile < share.stop; tile++) {
            gemv_tile(w, tile, input, n, products);
            int rows = std::min(TILE, w.rows - tile * TILE);
            for (int t = 0; t < n; t++) memcpy(y + size_t(t) * w.rows + tile * TILE, products + t * TILE, rows * 4);
        }
    }
}
