// The operations as plain functions over raw pointers: what the binding and the fuzz driver call.
//
// Tensors are N H W C, contiguous float32; a weight is out_channels × in_channels / groups × k × k. Nothing here
// allocates a result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.hpp"

namespace epsanet {

struct BranchShape {
    int kernel, groups;
};

// Throws std::invalid_argument, saying why, for what the loops cannot compute. The orders are the natural channels of
// the lane positions (see order.py) and must outlive the problem; lanes of images take none.
Problem make_problem(int batch, int height, int width, int in_channels, int out_channels, int stride,
                     const std::vector<BranchShape> &branches, bool split, Lanes lanes_are, bool ordered,
                     const std::int32_t *in_order, const std::int32_t *out_order);
// Throws std::invalid_argument for orders that lead out of a branch's memory; for every layer once, before its calls.
void check_orders(const Problem &problem);

std::size_t packed_size(const Problem &problem, Direction direction);
void pack_weights(const Problem &problem, Direction direction, const float *const *weights, float *packed,
                  int threads);

// A number that changes when a weight does: whether packed weights are still good.
std::uint64_t fingerprint(const float *values, std::size_t count, std::uint64_t before);

// `y` N H' W' K and `sums` N K, the sums of y over space; null: not wanted.
void forward(const Problem &problem, const float *x, const float *packed, float *y, float *sums, int threads);
// What follows the convolutions in an inference network, in place: y · attention · scale + shift, ReLU if asked for.
// SEWeight's maps have shapes hidden × D and D × hidden; scale and shift K, in the order of y's channels.
struct Attention {
    const float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    int hidden;
    bool over_scales;  // or over the channels of each branch
    const float *scale, *shift;
    bool relu;
};
void recalibrate(const Problem &problem, const Attention &attention, const float *sums, float *y, int threads);
void pointwise(const Pointwise &layer, int threads);

// `add` N K, or null, is added to every pixel of dy: the gradient of `sums`.
void input_gradient(const Problem &problem, const float *dy, const float *add, const float *packed, float *dx,
                    int threads);
void weight_gradient(const Problem &problem, const float *x, const float *dy, const float *add,
                     float *const *gradients, int threads);

// The instruction sets of this processor, fastest first, and the one in use. Setting an absent one throws
// std::invalid_argument.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string &name);
void set_kernels(const Kernels &kernels);
const Kernels &kernels_in_use();

}  // namespace epsanet
