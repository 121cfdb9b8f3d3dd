// Batch norm of a training step, with the residual sum and ReLU that follow it, and its gradients.
//
// Tensors are N H W C, contiguous float32. Sums are taken of pieces that depend on the shape only, and added in double:
// the number of threads does not change a result.
#pragma once

#include <cstddef>

namespace epsanet {

// Results of more floats than this go past the caches to memory; the fuzz driver lowers it.
extern std::ptrdiff_t norm_floats_cached;

struct BatchNorm {
    std::ptrdiff_t pixels;  // of the whole batch
    int channels;
    const float *x, *weight, *bias;
    double epsilon;
    bool relu;
    const float *factors;  // of each channel of each image, or null: 1; not with a convolution
    std::ptrdiff_t image_pixels;
};

// A dense 1×1 convolution whose result the norm takes; its weight is K × C, both multiples of 16.
struct Dense {
    int in_channels;
    const float *x, *weight;
};

// y = (x · factor - mean) / sqrt(variance + epsilon) · weight + bias, + residual unless that is null, then ReLU if asked
// for. Mean and variance of each channel (that of the batch, divided by the number of pixels) are written too. With a
// convolution, its result is written to `result`, which is norm.x.
void batch_norm(const BatchNorm &norm, const Dense *convolution, float *result, const float *residual, float *y, float *mean,
                float *variance, int threads);

// The gradient of what else was made of the convolution's input: of all its pixels, or of those in every `stride`-th row
// and column of images of height × width.
struct Shortcut {
    const float *gradient;
    int height, width, stride;
};

struct Gradients {
    float *x;            // of the convolution's input if there is one, plus the shortcut's
    float *convolution;  // null without one
    float *residual;     // null without one
    float *weight, *bias;
    float *factors;  // null without them
};

// From dy, and y where there was a residual (else null). The gradient between norm and convolution is never in memory
// as a whole.
void batch_norm_gradient(const BatchNorm &norm, const Dense *convolution, const Shortcut *shortcut, const float *dy, const float *y,
                         const float *mean, const float *variance, const Gradients &to, int threads);

}  // namespace epsanet
