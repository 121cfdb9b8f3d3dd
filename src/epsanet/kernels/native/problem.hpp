// One layer of grouped convolutions, and what an instruction set implements of it.
//
// Nothing here is inline: the linker keeps one copy of an inline function, and it may be the one that was compiled
// for a newer processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace epsanet {

constexpr int lanes = 16;         // floats of one vector, on every instruction set
constexpr int max_branches = 8;   // convolutions of one layer
constexpr int max_kernel = 31;
constexpr int weight_block = 2;   // result vectors that share one load of the source

// One convolution k×k with padding (k - 1) / 2. Channels are counted and offset inside the layer's tensors.
struct Branch {
    int kernel, groups;
    int in_channels, out_channels;
    int in_offset, out_offset;
    int in_place, out_place;  // offsets in scratch, where every branch has room for whole vectors
};

// What a vector's lanes are: the groups of one image (order.py has the channel order), or the same channel of sixteen
// images, for layers too narrow to fill a vector with groups.
enum class Lanes { groups, images };

struct Problem {
    int batch, height, width, in_channels, out_channels, stride;
    int out_height, out_width, padding;  // padding: of the largest kernel
    int branch_count;
    Branch branches[max_branches];
    bool split;
    Lanes lanes_are;
    bool ordered;  // tensors outside hold the lane order already
    const std::int32_t *in_order, *out_order;  // natural channel of each lane position
    int in_places, out_places;
    int forward_rows, backward_rows, forward_bands, backward_bands;  // rows of a unit of work
};

enum class Direction { forward, backward };  // backward: from the result's gradient to the input's

// How one branch's tensors meet the lanes, the same for packing weights and for computing.
struct Layout {
    int width;         // neighbouring floats of the source that one load repeats over the lanes
    int outer;         // independent sets of lanes
    int depth;         // source channels of a group
    int results;       // result channels of a group
    int repeats;       // results of a group side by side in one vector
    int blocks;        // result vectors of one set of lanes
    int weight_lanes;  // weights side by side for one vector: 16, or 1 that serves all
};

Layout layout_of(const Problem &problem, const Branch &branch, Direction direction);

// Rows of one image (or of sixteen). `branch`, or `branch`, `outer` and `block`, pick one part of a forward
// pass; -1: all of it.
struct Unit {
    int image, band, row_begin, row_end;
    int branch, outer, block;
};

struct Scratch {
    float *source, *second, *result;
};

// A dense 1×1 convolution of an inference network: x · weights + bias, + residual unless that is null, then ReLU if
// asked for. Weights are packed as those of a branch with one group; the residual lies as y does.
struct Pointwise {
    int batch, height, width, in_channels, out_channels, stride;
    const float *x, *weights, *bias, *residual;
    bool relu;
    float *y;
    bool past_caches;  // y is aligned to 64 bytes, has whole vectors of channels, and is too large for a cache
};
// Channels of the source that stay in a second-level cache, for a panel of pixels, while all results are made of them.
constexpr int panel_depth = 512;

// Some pixels of a batch norm's tensors: `rows` rows of `row` floats, and `rest` floats. A row is as many pixels as fill
// whole vectors, so that a channel stands at the same places of every row.
struct Rows {
    ptrdiff_t rows;
    int row, rest;
    bool past_caches;  // results are aligned, and too large to be found in a cache again
};

// What a batch norm does to x, each number repeated to fill a row: y = (x · factor - mean) · scale + bias, then ReLU if
// asked for. `factor` is that of the rows' image, or null: 1.
struct Norm {
    const float *mean, *scale, *bias;
    bool relu;
    const float *factor;
};

// The operations in one instruction set. `add` is added to every pixel of the result's gradient.
struct Kernels {
    const char *name;
    void (*forward)(const Problem &, const Unit &, const float *x, const float *weights, float *y, float *sums,
                    const Scratch &);
    void (*input_gradient)(const Problem &, const Unit &, const float *dy, const float *add, const float *weights,
                           float *dx, const Scratch &);
    void (*weight_gradient)(const Problem &, const Unit &, const float *x, const float *dy, const float *add,
                            float *gradient, const Scratch &);
    // Pixels `begin` to `end` of the batch's results, at most a panel of them, and of their vectors of channels `first`
    // to `last`; `scratch` has `pointwise_scratch` floats.
    void (*pointwise)(const Pointwise &, ptrdiff_t begin, ptrdiff_t end, int first, int last, float *scratch);
    std::size_t (*pointwise_scratch)(int depth);
    int pixels_of_tile, tiles_of_panel;
    // y = y · scale + shift for every pixel of one image, then ReLU if asked for.
    void (*rescale)(float *y, int pixels, int channels, const float *scale, const float *shift, bool relu);
    // sums[i][j] += the sum of a[pixel][i] · b[pixel][j]; rows and columns are multiples of 16. `scratch` has
    // `outer_scratch` floats.
    void (*outer_products)(const float *a, int rows, const float *b, int columns, int pixels, float *sums, float *scratch);
    std::size_t (*outer_scratch)(int rows, int columns, int pixels);
    void (*norm_sums)(const Rows &, const float *x, const float *factor, const float *shift, float *copy, float *sum, float *square);
    void (*norm_apply)(const Rows &, const Norm &, const float *x, const float *residual, float *y);
    void (*norm_gradient_sums)(const Rows &, const Norm &, const float *dy, const float *x, const float *y,
                               float *before_relu, float *sum, float *product);
    void (*norm_gradient)(const Rows &, const Norm &, const float *slope, const float *offset, const float *dy,
                          const float *x, bool masked, float *dx, float *dfactor);
};

extern const Kernels kernels_portable;
#ifdef EPSANET_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif
#ifdef EPSANET_AMX
const Kernels &kernels_amx();  // those of AVX-512, but for the 1×1 convolutions and their weight gradients
#endif

}  // namespace epsanet
