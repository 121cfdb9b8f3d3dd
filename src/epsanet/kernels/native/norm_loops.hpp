// The loops of batch norm in training and of the 1×1 convolutions before it; a part of loops.hpp, which says how it is
// compiled.
#include <string.h>

#include "problem.hpp"

namespace epsanet {
namespace EPSANET_ISA {
namespace {

// ------------------------------------------------------------------------------ dense 1×1 convolutions in training

constexpr int product_rows = 4, product_vectors = weights_fit_registers ? 4 : 1;

// What to fetch of a and b meanwhile, of as many pixels; null: nothing.
template <int vectors>
void multiply_outer(const float *a, Offset a_pixel, const float *b, Offset b_pixel, int pixels, float *to, Offset to_row, const float *next_a,
                    const float *next_b) {
    Vector sum[product_rows][vectors];
    for (int r = 0; r < product_rows; ++r)
        for (int v = 0; v < vectors; ++v) sum[r][v] = zero();
    for (int p = 0; p < pixels; ++p, a += a_pixel, b += b_pixel) {
        Vector right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load(b + v * lanes);
        if (next_a) __builtin_prefetch(next_a + p * a_pixel);
        if (next_b) __builtin_prefetch(next_b + p * b_pixel);
        for (int r = 0; r < product_rows; ++r) {
            const Vector left = repeat<1>(a + r);
            for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < product_rows; ++r)
        for (int v = 0; v < vectors; ++v) {
            float *at = to + r * to_row + v * lanes;
            store(at, add(load(at), sum[r][v]));
        }
}

void outer_products(const float *a, int rows, const float *b, int columns, int pixels, float *sums, float *) {
    constexpr int pixels_at_once = 64;  // whose columns stay in a first-level cache for all rows
    for (int begin = 0; begin < pixels; begin += pixels_at_once, a += Offset(pixels_at_once) * rows, b += Offset(pixels_at_once) * columns) {
        const int count = least(pixels_at_once, pixels - begin);
        for (int column = 0; column < columns; column += product_vectors * lanes) {
            const int vectors = least(product_vectors, (columns - column) / lanes);
            for (int row = 0; row < rows; row += product_rows) {
                // The next pixels: a vector of b's columns in each of the first rounds, one of a's rows in every fourth.
                const int round = row / product_rows;
                const float *next_a = column == 0 && row % lanes == 0 ? a + Offset(pixels_at_once) * rows + row : nullptr;
                const float *next_b = round < vectors ? b + Offset(pixels_at_once) * columns + column + round * lanes : nullptr;
                const auto run = [&](auto multiply) {
                    multiply(a + row, rows, b + column, columns, count, sums + Offset(row) * columns + column, columns, next_a, next_b);
                };
                if constexpr (product_vectors == 1) {
                    run(multiply_outer<1>);
                } else {
                    switch (vectors) {
                        case 1: run(multiply_outer<1>); break;
                        case 2: run(multiply_outer<2>); break;
                        case 3: run(multiply_outer<3>); break;
                        default: run(multiply_outer<4>);
                    }
                }
            }
        }
    }
}

std::size_t outer_scratch(int, int, int) { return 0; }

// ------------------------------------------------------------------------------------------- batch norm in training

// Calls run(first row, rows, first column, vectors as a type) for parts of a piece: few rows, which stay in a first-level
// cache, and few vectors of them, whose sums stay in registers.
constexpr int norm_vectors = weights_fit_registers ? 4 : 1, norm_rows = 32;

template <int count> struct Count {
    static constexpr int value = count;
};

template <class Run> void each_part(const Rows &part, const Run &run) {
    for (Offset first = 0; first < part.rows; first += norm_rows) {
        const int rows = int(part.rows - first < norm_rows ? part.rows - first : norm_rows);
        int column = 0;
        for (; column + norm_vectors * lanes <= part.row; column += norm_vectors * lanes) run(first, rows, column, Count<norm_vectors>{});
        for (; column < part.row; column += lanes) run(first, rows, column, Count<1>{});
    }
}

// x · factor, which is 1 if it is null.
Vector scaled(Vector x, const float *factor, Offset at) { return factor ? multiply_add(x, load(factor + at), zero()) : x; }
float scaled(float x, const float *factor, int at) { return factor ? x * factor[at] : x; }

// Sums of x · factor - shift and of its square, for each place of a row; x goes to `copy` too unless that is null.
void norm_sums(const Rows &part, const float *x, const float *factor, const float *shift, float *copy, float *sum, float *square) {
    memset(sum, 0, sizeof(float) * part.row);
    memset(square, 0, sizeof(float) * part.row);
    each_part(part, [&](Offset first, int rows, int column, auto vectors) {
        constexpr int count = decltype(vectors)::value;
        Vector shifts[count], sums[count], squares[count];
        for (int v = 0; v < count; ++v) {
            shifts[v] = load(shift + column + v * lanes);
            sums[v] = load(sum + column + v * lanes);
            squares[v] = load(square + column + v * lanes);
        }
        for (Offset at = first * part.row + column; rows > 0; --rows, at += part.row)
            for (int v = 0; v < count; ++v) {
                const Vector value = load(x + at + v * lanes), difference = subtract(scaled(value, factor, column + v * lanes), shifts[v]);
                if (copy) put(copy + at + v * lanes, value, part.past_caches);
                sums[v] = add(sums[v], difference);
                squares[v] = multiply_add(difference, difference, squares[v]);
            }
        for (int v = 0; v < count; ++v) {
            store(sum + column + v * lanes, sums[v]);
            store(square + column + v * lanes, squares[v]);
        }
    });
    const Offset whole = part.rows * part.row;
    for (int c = 0; c < part.rest; ++c) {
        const float difference = scaled(x[whole + c], factor, c) - shift[c];
        if (copy) copy[whole + c] = x[whole + c];
        sum[c] += difference;
        square[c] += difference * difference;
    }
    finish_streams();
}

// y = (x · factor - mean) · scale + bias, + residual unless that is null, then ReLU if asked for.
void norm_apply(const Rows &part, const Norm &norm, const float *x, const float *residual, float *y) {
    for (Offset r = 0; r < part.rows; ++r, x += part.row, y += part.row) {
        for (int c = 0; c < part.row; c += lanes) {
            const Vector difference = subtract(scaled(load(x + c), norm.factor, c), load(norm.mean + c));
            Vector value = multiply_add(difference, load(norm.scale + c), load(norm.bias + c));
            if (residual) value = add(value, load(residual + c));
            put(y + c, norm.relu ? positive(value) : value, part.past_caches);
        }
        if (residual) residual += part.row;
    }
    for (int c = 0; c < part.rest; ++c) {
        float value = (scaled(x[c], norm.factor, c) - norm.mean[c]) * norm.scale[c] + norm.bias[c];
        if (residual) value += residual[c];
        y[c] = norm.relu && value < 0 ? 0 : value;
    }
    finish_streams();
}

// Sums of the gradient g before ReLU and of g · (x · factor - mean), for each place of a row. ReLU's sign is that of y, or of
// what x becomes if y is null; g goes to `before_relu` unless that is null.
void norm_gradient_sums(const Rows &part, const Norm &norm, const float *dy, const float *x, const float *y,
                        float *before_relu, float *sum, float *product) {
    memset(sum, 0, sizeof(float) * part.row);
    memset(product, 0, sizeof(float) * part.row);
    each_part(part, [&](Offset first, int rows, int column, auto vectors) {
        constexpr int count = decltype(vectors)::value;
        Vector means[count], scales[count], biases[count], sums[count], products[count];
        for (int v = 0; v < count; ++v) {
            means[v] = load(norm.mean + column + v * lanes);
            scales[v] = load(norm.scale + column + v * lanes);
            biases[v] = load(norm.bias + column + v * lanes);
            sums[v] = load(sum + column + v * lanes);
            products[v] = load(product + column + v * lanes);
        }
        for (Offset row = first * part.row + column; rows > 0; --rows, row += part.row)
            for (int v = 0; v < count; ++v) {
                const Offset at = row + v * lanes;
                const Vector difference = subtract(scaled(load(x + at), norm.factor, column + v * lanes), means[v]);
                Vector g = load(dy + at);
                if (norm.relu) g = where_positive(g, y ? load(y + at) : multiply_add(difference, scales[v], biases[v]));
                if (before_relu) put(before_relu + at, g, part.past_caches);
                sums[v] = add(sums[v], g);
                products[v] = multiply_add(g, difference, products[v]);
            }
        for (int v = 0; v < count; ++v) {
            store(sum + column + v * lanes, sums[v]);
            store(product + column + v * lanes, products[v]);
        }
    });
    const Offset whole = part.rows * part.row;
    for (int c = 0; c < part.rest; ++c) {
        const Offset at = whole + c;
        const float difference = scaled(x[at], norm.factor, c) - norm.mean[c];
        const float after = y ? y[at] : difference * norm.scale[c] + norm.bias[c];
        const float g = norm.relu && after <= 0 ? 0 : dy[at];
        if (before_relu) before_relu[at] = g;
        sum[c] += g;
        product[c] += g * difference;
    }
    finish_streams();
}

// d = g · scale + (x · factor - mean) · slope + offset and dx = d · factor, where dy is g already if `masked`. With a
// factor, sums of d · x for each place of a row are its gradient.
void norm_gradient(const Rows &part, const Norm &norm, const float *slope, const float *offset, const float *dy,
                   const float *x, bool masked, float *dx, float *dfactor) {
    const bool relu = norm.relu && !masked;
    if (norm.factor) memset(dfactor, 0, sizeof(float) * part.row);
    each_part(part, [&](Offset first, int rows, int column, auto vectors) {
        constexpr int count = decltype(vectors)::value;
        Vector products[count];
        for (int v = 0; v < count; ++v) products[v] = norm.factor ? load(dfactor + column + v * lanes) : zero();
        for (Offset row = first * part.row + column; rows > 0; --rows, row += part.row)
            for (int v = 0; v < count; ++v) {
                const Offset at = row + v * lanes;
                const int c = column + v * lanes;
                const Vector value = load(x + at), difference = subtract(scaled(value, norm.factor, c), load(norm.mean + c));
                const Vector scale = load(norm.scale + c);
                Vector g = load(dy + at);
                if (relu) g = where_positive(g, multiply_add(difference, scale, load(norm.bias + c)));
                const Vector d = multiply_add(g, scale, multiply_add(difference, load(slope + c), load(offset + c)));
                if (norm.factor) products[v] = multiply_add(d, value, products[v]);
                put(dx + at, scaled(d, norm.factor, c), part.past_caches);
            }
        for (int v = 0; norm.factor && v < count; ++v) store(dfactor + column + v * lanes, products[v]);
    });
    const Offset whole = part.rows * part.row;
    for (int c = 0; c < part.rest; ++c) {
        const float value = x[whole + c], difference = scaled(value, norm.factor, c) - norm.mean[c];
        const float g = relu && difference * norm.scale[c] + norm.bias[c] <= 0 ? 0 : dy[whole + c];
        const float d = g * norm.scale[c] + (difference * slope[c] + offset[c]);
        if (norm.factor) dfactor[c] += d * value;
        dx[whole + c] = scaled(d, norm.factor, c);
    }
    finish_streams();
}

}  // namespace
}  // namespace EPSANET_ISA
}  // namespace epsanet
