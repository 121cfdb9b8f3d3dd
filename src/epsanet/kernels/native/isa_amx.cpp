// The dense 1×1 convolutions, and their weight gradients, on the matrix unit of newer Intel processors (AMX), as accurate
// as in float.
//
// The unit multiplies tiles of bfloat16, which has eight significant bits, and adds in float. A float's 24 bits are
// cut into three such parts, whose sum it is exactly: x = x0 + x1 + x2. Of the nine products of two numbers' parts,
// the three smallest are below 2^-21 of the whole together, mostly far below, and left out (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019). Six products
// at sixteen times the rate of 512-bit vectors remain. An infinite source gives NaN: it has no parts.
#include <immintrin.h>

#include <atomic>

#include "problem.hpp"

namespace epsanet {
namespace {

using Offset = std::ptrdiff_t;
using Half = std::uint16_t;  // the upper half of a float: bfloat16

constexpr int parts = 3;
constexpr int tile_rows = 16;   // pixels, or pairs of channels
constexpr int tile_depth = 32;  // channels
constexpr int tile = tile_rows * tile_depth, sums_tile = tile_rows * lanes;  // numbers of a tile
constexpr int worth_channels = 64;  // on either side: with fewer, cutting into parts costs what tiles save
constexpr int panel_tiles = 14;  // of pixels, whose parts stay in a second-level cache

// What the unit is told of its eight tiles. A constant, since not every compiler sees all of it being read.
struct alignas(64) TileShapes {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t bytes_of_row[16];
    std::uint8_t rows[16];
};
static_assert(tile_rows == 16 && tile_depth * sizeof(Half) == 64);
const TileShapes shapes{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

int divide_up(int a, int b) { return (a + b - 1) / b; }
int least(int a, int b) { return a < b ? a : b; }

// The parts of two vectors of floats, `tile` apart; channel i of the first and of the second become neighbours, as the
// unit wants pairs.
void store_parts(__m512 low, __m512 high, Half *to, Offset part) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    for (int p = 0; p < parts; ++p) {
        const __m512i bits = _mm512_castps_si512(high);
        const __m512i both = _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(low), 16), bits, upper, 0xf8);
        _mm512_storeu_si512(to + p * part, both);  // f8: the first, or the second and the third
        if (p + 1 == parts) break;
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(low), upper)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
    }
}

__mmask16 first_lanes(int count) { return __mmask16((1u << (count < 0 ? 0 : count > lanes ? lanes : count)) - 1); }

// Weights that are needed next and come from far away: a few lines of them are asked for in each step of other work.
struct Fetch {
    const float *next, *end;
    Offset floats;  // of a step

    Fetch(const float *begin, Offset count, Offset steps)
        : next(begin), end(begin + count), floats((count + steps * lanes - 1) / (steps * lanes) * lanes) {}
    void step() {
        for (const float *to = end - next > floats ? next + floats : end; next < to; next += lanes) __builtin_prefetch(next, 0, 2);
    }
};

// The row of one pixel in its tiles, [tile of channels][part].
void pack_pixel(const float *from, int depth, Half *to, Fetch &fetch) {
    for (int channel = 0; channel < depth; channel += tile_depth, to += parts * tile) {
        fetch.step();
        const int left = depth - channel;
        store_parts(_mm512_maskz_loadu_ps(first_lanes(left), from + channel),
                    _mm512_maskz_loadu_ps(first_lanes(left - lanes), from + channel + lanes), to, tile);
    }
}

// Tiles of the weights of one or two vectors of results: [tile of channels][part][vector], 16 pairs of channels each.
void pack_results(const float *weights, int depth, int blocks, Half *to) {
    const Offset row = blocks * lanes;
    const auto channel_of = [&](int channel, int block) {
        return channel < depth ? _mm512_loadu_ps(weights + channel * row + block * lanes) : _mm512_setzero_ps();
    };
    for (int channel = 0; channel < depth; channel += tile_depth, to += parts * blocks * tile)
        for (int pair = 0; pair < tile_rows; ++pair)
            for (int block = 0; block < blocks; ++block)
                store_parts(channel_of(channel + pair, block), channel_of(channel + pair + tile_rows, block),
                            to + block * tile + pair * tile_depth, blocks * tile);
}

struct Target {
    float *y;
    const float *bias, *residual;
    Offset pixel;
    int pixels, blocks, last_lanes;
    bool first, last, relu;  // of the panels along the depth
    bool past_caches;
};

// The six products of one step's tiles, the smallest first; `load_left` and `load_right` load a part into tiles 4 and 5, 6 and 7.
template <bool two_left, bool two_right, class Left, class Right> void add_products(const Left &load_left, const Right &load_right) {
    const auto add = [] {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (two_right) _tile_dpbf16ps(1, 4, 7);
        if constexpr (two_left) _tile_dpbf16ps(2, 5, 6);
        if constexpr (two_left && two_right) _tile_dpbf16ps(3, 5, 7);
    };
    load_left(0);
    load_right(2);
    add();
    load_right(1);
    add();
    load_left(1);
    add();
    load_right(0);
    add();
    load_left(2);
    add();
    load_left(0);
    add();
}

// Sums of one or two tiles of pixels × one or two of results into `sums`, [tile of pixels][tile of results].
template <bool two_rows, bool two_blocks>
void multiply(const Half *pixels, Offset next_pixels, const Half *weights, int steps, const Target &to, float *sums, Fetch &fetch) {
    constexpr Offset row = tile_depth * sizeof(Half);
    // Compilers may not know that loading a tile reads memory: whatever was packed is to be there.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    constexpr Offset sums_row = lanes * sizeof(float);
    _tile_zero(0);
    if constexpr (two_blocks) _tile_zero(1);
    if constexpr (two_rows) _tile_zero(2);
    if constexpr (two_rows && two_blocks) _tile_zero(3);
    const auto load_pixels = [&](int part) {
        _tile_loadd(4, pixels + part * tile, row);
        if constexpr (two_rows) _tile_loadd(5, pixels + next_pixels + part * tile, row);
    };
    const auto load_weights = [&](int part) {
        const Half *from = weights + part * (two_blocks ? 2 : 1) * tile;
        _tile_loadd(6, from, row);
        if constexpr (two_blocks) _tile_loadd(7, from + tile, row);
    };
    for (int step = 0; step < steps; ++step) {
        // What the end of the tile touches, fetched meanwhile.
        for (int pixel = to.pixels * step / steps; pixel < to.pixels * (step + 1) / steps; ++pixel)
            for (int block = 0; block < to.blocks; ++block) {
                if (!to.past_caches) __builtin_prefetch(to.y + pixel * to.pixel + block * lanes, 1);
                if (to.residual) __builtin_prefetch(to.residual + pixel * to.pixel + block * lanes);
            }
        fetch.step();
        add_products<two_rows, two_blocks>(load_pixels, load_weights);
        pixels += parts * tile;
        weights += parts * (two_blocks ? 2 : 1) * tile;
    }
    _tile_stored(0, sums, sums_row);
    if constexpr (two_blocks) _tile_stored(1, sums + sums_tile, sums_row);
    if constexpr (two_rows) _tile_stored(2, sums + 2 * sums_tile, sums_row);
    if constexpr (two_rows && two_blocks) _tile_stored(3, sums + 3 * sums_tile, sums_row);
}

using Multiply = void (*)(const Half *, Offset, const Half *, int, const Target &, float *, Fetch &);

void finish(const float *sums, const Target &to) {
    for (int pixel = 0; pixel < to.pixels; ++pixel)
        for (int block = 0; block < to.blocks; ++block) {
            const __mmask16 mask = first_lanes(block == to.blocks - 1 ? to.last_lanes : lanes);
            const Offset at = pixel * to.pixel + block * lanes;
            __m512 value = _mm512_loadu_ps(sums + ((pixel / tile_rows * 2 + block) * tile_rows + pixel % tile_rows) * lanes);
            if (!to.first) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to.y + at));
            if (to.last) {
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to.bias + block * lanes));
                if (to.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to.residual + at));
                // The second operand is what a NaN passes through.
                if (to.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
            }
            if (to.past_caches && to.last)
                _mm512_stream_ps(to.y + at, value);
            else
                _mm512_mask_storeu_ps(to.y + at, mask, value);
        }
}

void pointwise(const Pointwise &layer, Offset begin, Offset end, int first, int last, float *scratch) {
    if (layer.in_channels < worth_channels || layer.out_channels < worth_channels) {
        kernels_avx512.pointwise(layer, begin, end, first, last, scratch);
        return;
    }
    _tile_loadconfig(&shapes);
    const int stride = layer.stride, in = layer.in_channels, out = layer.out_channels;
    const int out_height = (layer.height - 1) / stride + 1, out_width = (layer.width - 1) / stride + 1;
    const int pixels = int(end - begin), pairs = divide_up(pixels, 2 * tile_rows);
    for (int channel = 0; channel < in; channel += panel_depth) {
        const int depth = least(panel_depth, in - channel);
        const int steps = divide_up(depth, tile_depth);
        const Offset next_pixels = Offset(steps) * parts * tile;
        float *const sums = scratch;
        Half *const weights = reinterpret_cast<Half *>(sums + 4 * sums_tile), *const source = weights + 2 * next_pixels;
        const auto weights_of = [&](int block) {
            return layer.weights + (Offset(block) * in + Offset(channel) * least(weight_block, last - block)) * lanes;
        };
        const auto weights_ahead = [&](int block, Offset steps) {
            return block < last ? Fetch(weights_of(block), Offset(depth) * least(weight_block, last - block) * lanes, steps) : Fetch(nullptr, 0, 1);
        };
        Fetch fetch = weights_ahead(first, Offset(pixels) * steps);
        for (Offset pixel = begin; pixel < end; ++pixel) {
            Offset from = pixel;
            if (stride > 1) {
                const Offset row = pixel / out_width, image = row / out_height;
                from = (image * layer.height + row % out_height * stride) * layer.width + pixel % out_width * stride;
            }
            const int at = int(pixel - begin);
            pack_pixel(layer.x + from * in + channel, depth,
                       source + at / tile_rows * next_pixels + at % tile_rows * tile_depth, fetch);
        }
        for (int block = first; block < last; block += weight_block) {
            Target to{};
            to.blocks = least(weight_block, last - block);
            to.pixel = out;
            to.bias = layer.bias + block * lanes;
            to.last_lanes = out - (block + to.blocks - 1) * lanes;
            to.first = channel == 0;
            to.last = channel + depth == in;
            to.relu = layer.relu;
            to.past_caches = layer.past_caches;
            pack_results(weights_of(block), depth, to.blocks, weights);
            fetch = weights_ahead(block + weight_block, Offset(pairs) * steps);
            for (int at = 0; at < pixels; at += 2 * tile_rows) {
                const Offset result = (begin + at) * out + block * lanes;
                to.pixels = least(2 * tile_rows, pixels - at);
                to.y = layer.y + result;
                to.residual = layer.residual ? layer.residual + result : nullptr;
                const Multiply run = to.pixels > tile_rows ? to.blocks == 2 ? multiply<true, true> : multiply<true, false>
                                     : to.blocks == 2      ? multiply<false, true>
                                                           : multiply<false, false>;
                run(source + at / tile_rows * next_pixels, next_pixels, weights, steps, to, sums, fetch);
                finish(sums, to);
            }
        }
    }
    _tile_release();
    _mm_sfence();
}

std::size_t pointwise_scratch(int depth) {
    const std::size_t steps = divide_up(depth, tile_depth);
    const std::size_t halves = (2 + panel_tiles) * steps * parts * tile;
    return 4 * sums_tile + halves * sizeof(Half) / sizeof(float);
}

// ------------------------------------------------------------------------------------------------- outer products

constexpr int pixels_of_step = tile_depth;  // that one product of tiles adds up; pixels i and i + 16 are a pair

const float no_pixel[lanes] = {};

// Four channels of sixteen pixels: one vector a channel.
void transpose(const float *const *pixels, int channel, __m512 *to) {
    __m512 v[4];  // pixels i, 4 + i, 8 + i and 12 + i
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int pixel) { return _mm_loadu_ps(pixels[pixel] + channel); };
        v[i] = _mm512_castps128_ps512(at(i));
        v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x00f0, at(4 + i));
        v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x0f00, at(8 + i));
        v[i] = _mm512_mask_broadcast_f32x4(v[i], 0xf000, at(12 + i));
    }
    const auto pairs = [](__m512 a, __m512 b, auto unpack) { return _mm512_castps_pd(unpack(a, b)); };
    const auto low = [](__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b); };
    const auto high = [](__m512 a, __m512 b) { return _mm512_unpackhi_ps(a, b); };
    const __m512d first = pairs(v[0], v[1], low), second = pairs(v[2], v[3], low), third = pairs(v[0], v[1], high), fourth = pairs(v[2], v[3], high);
    to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
    to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(third, fourth));
    to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(third, fourth));
}

// Tiles [sixteen of the rows][part], whose rows are channels, and whose columns are pixels.
void pack_rows(const float *a, int rows, int pixels, Half *to) {
    for (int row = 0; row < rows; row += lanes, to += parts * tile) {
        const float *from[pixels_of_step];
        for (int pixel = 0; pixel < pixels_of_step; ++pixel) from[pixel] = pixel < pixels ? a + Offset(pixel) * rows + row : no_pixel;
        for (int channel = 0; channel < lanes; channel += 4) {
            __m512 low[4], high[4];
            transpose(from, channel, low);
            transpose(from + tile_rows, channel, high);
            for (int c = 0; c < 4; ++c) store_parts(low[c], high[c], to + (channel + c) * tile_depth, tile);
        }
    }
}

// Tiles [sixteen of the columns][part], whose rows are pairs of pixels.
void pack_columns(const float *b, int columns, int pixels, Half *to) {
    for (int pair = 0; pair < tile_rows; ++pair) {
        const auto load = [&](int pixel, int column) { return pixel < pixels ? _mm512_loadu_ps(b + Offset(pixel) * columns + column) : _mm512_setzero_ps(); };
        for (int column = 0; column < columns; column += lanes)
            store_parts(load(pair, column), load(pair + tile_rows, column), to + column * parts * tile_depth + pair * tile_depth, tile);
    }
}

// Sums over pixels of one or two tiles of rows times one or two of columns, added to `sums`.
template <bool two_rows, bool two_columns>
void add_outer(const Half *left, Offset next_left, const Half *right, Offset next_right, int steps, float *sums, Offset sums_row) {
    constexpr Offset row = tile_depth * sizeof(Half), other = parts * tile;
    const Offset below = tile_rows * sums_row, bytes = sums_row * sizeof(float);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // as in `multiply`
    _tile_loadd(0, sums, bytes);
    if constexpr (two_columns) _tile_loadd(1, sums + lanes, bytes);
    if constexpr (two_rows) _tile_loadd(2, sums + below, bytes);
    if constexpr (two_rows && two_columns) _tile_loadd(3, sums + below + lanes, bytes);
    for (int step = 0; step < steps; ++step, left += next_left, right += next_right)
        add_products<two_rows, two_columns>(
            [&](int part) {
                _tile_loadd(4, left + part * tile, row);
                if constexpr (two_rows) _tile_loadd(5, left + other + part * tile, row);
            },
            [&](int part) {
                _tile_loadd(6, right + part * tile, row);
                if constexpr (two_columns) _tile_loadd(7, right + other + part * tile, row);
            });
    _tile_stored(0, sums, bytes);
    if constexpr (two_columns) _tile_stored(1, sums + lanes, bytes);
    if constexpr (two_rows) _tile_stored(2, sums + below, bytes);
    if constexpr (two_rows && two_columns) _tile_stored(3, sums + below + lanes, bytes);
}

void outer_products(const float *a, int rows, const float *b, int columns, int pixels, float *sums, float *scratch) {
    if (rows < worth_channels || columns < worth_channels) {
        kernels_avx512.outer_products(a, rows, b, columns, pixels, sums, scratch);
        return;
    }
    _tile_loadconfig(&shapes);
    const int steps = divide_up(pixels, pixels_of_step);
    const Offset next_rows = Offset(rows) * parts * tile_depth, next_columns = Offset(columns) * parts * tile_depth;
    Half *const left = reinterpret_cast<Half *>(scratch), *const right = left + steps * next_rows;
    for (int step = 0; step < steps; ++step) {
        const Offset pixel = Offset(step) * pixels_of_step;
        const int count = least(pixels_of_step, int(pixels - pixel));
        pack_rows(a + pixel * rows, rows, count, left + step * next_rows);
        pack_columns(b + pixel * columns, columns, count, right + step * next_columns);
    }
    for (int column = 0; column < columns; column += 2 * lanes)
        for (int row = 0; row < rows; row += 2 * lanes) {
            const bool two_rows = row + lanes < rows, two_columns = column + lanes < columns;
            const auto run = two_rows ? two_columns ? add_outer<true, true> : add_outer<true, false>
                             : two_columns ? add_outer<false, true> : add_outer<false, false>;
            run(left + row * parts * tile_depth, next_rows, right + column * parts * tile_depth, next_columns, steps, sums + Offset(row) * columns + column, columns);
        }
    _tile_release();
}

std::size_t outer_scratch(int rows, int columns, int pixels) {
    return std::size_t(divide_up(pixels, pixels_of_step)) * (rows + columns) * parts * tile_depth * sizeof(Half) / sizeof(float);
}

}  // namespace

const Kernels &kernels_amx() {
    static const Kernels kernels = [] {
        Kernels those = kernels_avx512;
        those.name = "amx";
        those.pointwise = pointwise;
        those.pointwise_scratch = pointwise_scratch;
        those.pixels_of_tile = tile_rows;
        those.tiles_of_panel = panel_tiles;
        those.outer_products = outer_products;
        those.outer_scratch = outer_scratch;
        return those;
    }();
    return kernels;
}

}  // namespace epsanet
