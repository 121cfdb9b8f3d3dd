// What Python sees. Buffers are declared with type, dimensions, contiguity and device, so that a wrong one raises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "chain.hpp"
#include "convolution.hpp"
#include "norm.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace epsanet;

namespace {

template <class Type, class Shape> using Buffer = nb::ndarray<Type, Shape, nb::c_contig, nb::device::cpu>;
using Image = Buffer<const float, nb::ndim<4>>;
using Weight = Buffer<const float, nb::ndim<4>>;
using Weights = std::vector<Weight>;
using Matrix = Buffer<const float, nb::ndim<2>>;
using Row = Buffer<const float, nb::ndim<1>>;

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

// A layer of fixed channels, kernels and groups. Orders are lists of natural channels by lane position, empty for
// lanes of images.
class Layer {
  public:
    Layer(int in_channels, int out_channels, const std::vector<int> &kernels, const std::vector<int> &groups,
          int stride, bool split, std::vector<std::int32_t> in_order, std::vector<std::int32_t> out_order)
        : in_channels_(in_channels), out_channels_(out_channels), stride_(stride), split_(split),
          in_order_(std::move(in_order)), out_order_(std::move(out_order)) {
        require(kernels.size() == groups.size(), "kernels and groups must have one entry a branch");
        for (std::size_t b = 0; b < kernels.size(); ++b) branches_.push_back({kernels[b], groups[b]});
        require(in_order_.size() == out_order_.size() ? in_order_.empty() || int(in_order_.size()) == in_channels
                                                      : int(in_order_.size()) == in_channels,
                "the input order must name every channel");
        require(out_order_.empty() ? in_order_.empty() : int(out_order_.size()) == out_channels,
                "the output order must name every channel");
        check_orders(problem(1, 1, 1, false));
    }

    Problem problem(int batch, int height, int width, bool ordered) const {
        const bool images = in_order_.empty();
        return make_problem(batch, height, width, in_channels_, out_channels_, stride_, branches_, split_,
                            images ? Lanes::images : Lanes::groups, ordered, images ? nullptr : in_order_.data(),
                            images ? nullptr : out_order_.data());
    }

    std::size_t packed_size(bool backward) const {
        return epsanet::packed_size(problem(1, 1, 1, false), direction(backward));
    }

    void pack(const Weights &weights, Buffer<float, nb::ndim<1>> packed, bool backward, int threads) const {
        const Problem layer = problem(1, 1, 1, false);
        require(weights.size() == branches_.size(), "there must be one weight a branch");
        std::vector<const float *> pointers;
        for (std::size_t b = 0; b < weights.size(); ++b) {
            check_weight(layer.branches[b], weights[b].shape(0), weights[b].shape(1), weights[b].shape(2),
                         weights[b].shape(3));
            pointers.push_back(weights[b].data());
        }
        require(packed.size() == packed_size(backward), "the packed buffer has the wrong size");
        const nb::gil_scoped_release release;
        pack_weights(layer, direction(backward), pointers.data(), packed.data(), threads);
    }

    void forward(Image x, Row packed, Buffer<float, nb::ndim<4>> y, Buffer<float, nb::ndim<2>> sums, bool ordered,
                 int threads) const {
        const Problem layer = problem_of(x, ordered);
        check_packed(packed, false);
        check_result(layer, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
        require(sums.shape(0) == x.shape(0) && int(sums.shape(1)) == out_channels_, "sums must be N × K");
        const nb::gil_scoped_release release;
        epsanet::forward(layer, x.data(), packed.data(), y.data(), sums.data(), threads);
    }

    // A 1×1 convolution with bias, residual and activation of an inference network.
    void infer_pointwise(Image x, Row packed, Row bias, std::optional<Image> residual,
                           Buffer<float, nb::ndim<4>> y, bool relu, int threads) const {
        check_pointwise(packed, bias);
        const Problem layer = problem_of(x, true);
        check_result(layer, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
        if (residual)
            check_result(layer, residual->shape(0), residual->shape(1), residual->shape(2), residual->shape(3));
        const Pointwise convolution{layer.batch,    layer.height, layer.width,   in_channels_,
                                    out_channels_,  stride_,      x.data(),      packed.data(),
                                    bias.data(),    residual ? residual->data() : nullptr,
                                    relu,           y.data(),     false};
        const nb::gil_scoped_release release;
        pointwise(convolution, threads);
    }

    // Convolutions, attention, norm and activation of an inference network.
    void infer(Image x, Row packed, Matrix fc1_weight, Row fc1_bias, Matrix fc2_weight, Row fc2_bias, Row scale,
               Row shift, Buffer<float, nb::ndim<4>> y, bool over_scales, bool relu, bool ordered,
               int threads) const {
        const Problem layer = problem_of(x, ordered);
        check_result(layer, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
        const Attention maps = attention(packed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, over_scales, relu);
        const nb::gil_scoped_release release;
        std::vector<float> sums(std::size_t(layer.batch) * out_channels_);
        epsanet::forward(layer, x.data(), packed.data(), y.data(), sums.data(), threads);
        recalibrate(layer, maps, sums.data(), y.data(), threads);
    }

    void check_pointwise(const Row &packed, const Row &bias) const {
        require(branches_.size() == 1 && branches_[0].kernel == 1 && branches_[0].groups == 1 && !in_order_.empty(),
                "only one dense 1×1 convolution with its channel orders is inferred without attention");
        check_packed(packed, false);
        require(int(bias.size()) == out_channels_, "the bias must have K entries");
    }

    Attention attention(const Row &packed, const Matrix &fc1_weight, const Row &fc1_bias, const Matrix &fc2_weight,
                        const Row &fc2_bias, const Row &scale, const Row &shift, bool over_scales, bool relu) const {
        check_packed(packed, false);
        const std::size_t channels = out_channels_, each = channels / branches_.size(), hidden = fc1_weight.shape(0);
        require(fc1_weight.shape(1) == each && fc1_bias.size() == hidden && fc2_weight.shape(0) == each &&
                    fc2_weight.shape(1) == hidden && fc2_bias.size() == each,
                "the SEWeight's maps must be hidden × D and D × hidden");
        require(scale.size() == channels && shift.size() == channels, "scale and shift must have K entries");
        return {fc1_weight.data(), fc1_bias.data(), fc2_weight.data(), fc2_bias.data(), int(hidden), over_scales,
                scale.data(),      shift.data(),    relu};
    }

    void input_gradient(Image dy, std::optional<Matrix> dsums, Row packed, Buffer<float, nb::ndim<4>> dx,
                        bool ordered, int threads) const {
        const Problem layer = problem_of(dx, ordered);
        check_packed(packed, true);
        check_gradient(layer, dy, dsums);
        const nb::gil_scoped_release release;
        epsanet::input_gradient(layer, dy.data(), dsums ? dsums->data() : nullptr, packed.data(), dx.data(), threads);
    }

    void weight_gradient(Image x, Image dy, std::optional<Matrix> dsums,
                         const std::vector<Buffer<float, nb::ndim<4>>> &gradients, bool ordered, int threads) const {
        const Problem layer = problem_of(x, ordered);
        check_gradient(layer, dy, dsums);
        require(gradients.size() == branches_.size(), "there must be one gradient a branch");
        std::vector<float *> pointers;
        for (std::size_t b = 0; b < gradients.size(); ++b) {
            check_weight(layer.branches[b], gradients[b].shape(0), gradients[b].shape(1), gradients[b].shape(2),
                         gradients[b].shape(3));
            pointers.push_back(gradients[b].data());
        }
        const nb::gil_scoped_release release;
        epsanet::weight_gradient(layer, x.data(), dy.data(), dsums ? dsums->data() : nullptr, pointers.data(),
                                 threads);
    }

  private:
    static Direction direction(bool backward) { return backward ? Direction::backward : Direction::forward; }

    template <class Array> Problem problem_of(const Array &x, bool ordered) const {
        require(int(x.shape(3)) == in_channels_, "the input must be N × H × W × C with the layer's channels");
        return problem(int(x.shape(0)), int(x.shape(1)), int(x.shape(2)), ordered);
    }

    void check_result(const Problem &layer, std::size_t n, std::size_t h, std::size_t w, std::size_t k) const {
        require(int(n) == layer.batch && int(h) == layer.out_height && int(w) == layer.out_width &&
                    int(k) == out_channels_,
                "the output must be N × H' × W' × K");
    }

    void check_gradient(const Problem &layer, const Image &dy, const std::optional<Matrix> &dsums) const {
        check_result(layer, dy.shape(0), dy.shape(1), dy.shape(2), dy.shape(3));
        require(!dsums || (int(dsums->shape(0)) == layer.batch && int(dsums->shape(1)) == out_channels_),
                "the gradient of the sums must be N × K");
    }

    void check_packed(const Row &packed, bool backward) const {
        require(packed.size() == packed_size(backward), "the packed weights have the wrong size");
    }

    static void check_weight(const Branch &branch, std::size_t out, std::size_t in, std::size_t rows,
                             std::size_t columns) {
        require(int(out) == branch.out_channels && int(in) == branch.in_channels / branch.groups &&
                    int(rows) == branch.kernel && int(columns) == branch.kernel,
                "a weight must be D × C / groups × k × k");
    }

    int in_channels_, out_channels_, stride_;
    bool split_;
    std::vector<std::int32_t> in_order_, out_order_;
    std::vector<BranchShape> branches_;
};

// A chain whose layers and weights are kept with it.
class InferenceChain {
  public:
    // The next step: a 1×1 convolution of `source` with bias, residual and activation.
    void add_pointwise(const Layer &layer, Row packed, Row bias, bool relu, int source, int residual) {
        layer.check_pointwise(packed, bias);
        Step step{};
        step.problem = [layer](int batch, int height, int width) { return layer.problem(batch, height, width, true); };
        step.packed = packed.data();
        step.bias = bias.data();
        step.relu = relu;
        add(step, source, residual, {packed, bias});
    }

    // The next step: a PSA module with norm and activation.
    void add_attention(const Layer &layer, Row packed, Matrix fc1_weight, Row fc1_bias, Matrix fc2_weight, Row fc2_bias,
                       Row scale, Row shift, bool over_scales, bool relu, bool ordered, int source) {
        Step step{};
        step.problem = [layer, ordered](int batch, int height, int width) { return layer.problem(batch, height, width, ordered); };
        step.packed = packed.data();
        step.attends = true;
        step.attention = layer.attention(packed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, over_scales, relu);
        add(step, source, -1, {packed, fc1_bias, fc2_bias, scale, shift});
        matrices_.insert(matrices_.end(), {fc1_weight, fc2_weight});
    }

    std::tuple<int, int, int> result_size(int height, int width) {
        const Size size = chain().result_size(height, width);
        return {size.height, size.width, size.channels};
    }

    void run(Image x, Buffer<float, nb::ndim<4>> y, int threads) {
        Chain &steps = chain();
        require(int(x.shape(3)) == steps.in_channels(), "the input must be N × H × W × C with the first layer's channels");
        const Size size = steps.result_size(int(x.shape(1)), int(x.shape(2)));
        require(y.shape(0) == x.shape(0) && int(y.shape(1)) == size.height && int(y.shape(2)) == size.width &&
                    int(y.shape(3)) == size.channels,
                "the output must be N × H' × W' × K");
        const nb::gil_scoped_release release;
        steps.run(int(x.shape(0)), int(x.shape(1)), int(x.shape(2)), x.data(), y.data(), threads);
    }

  private:
    void add(Step &step, int source, int residual, std::initializer_list<Row> rows) {
        require(!chain_, "the chain has run already");
        step.source = source;
        step.residual = residual;
        steps_.push_back(step);
        rows_.insert(rows_.end(), rows);
    }

    Chain &chain() {
        if (!chain_) chain_ = std::make_unique<Chain>(steps_);
        return *chain_;
    }

    std::vector<Step> steps_;
    std::vector<Row> rows_;
    std::vector<Matrix> matrices_;
    std::unique_ptr<Chain> chain_;
};

using Result = Buffer<float, nb::ndim<4>>;
using RowResult = Buffer<float, nb::ndim<1>>;

template <class Tensor, class Other> void check_alike(const Tensor &x, const Other &other, const char *message) {
    for (int axis = 0; axis < 4; ++axis) require(other.shape(axis) == x.shape(axis), message);
}

// The norm of `x`, or of `z`, the result of a convolution of x.
template <class Tensor>
BatchNorm norm_of(const Image &x, const std::optional<Matrix> &factors, const std::optional<Matrix> &matrix, const std::optional<Tensor> &z, const Row &weight,
                  const Row &bias, double epsilon, bool relu, std::optional<Dense> &convolution) {
    require(x.size() > 0, "the input must not be empty");
    require(matrix.has_value() == z.has_value(), "a convolution's weight goes with its result");
    const std::size_t channels = matrix ? matrix->shape(0) : x.shape(3);
    require(weight.size() == channels && bias.size() == channels, "weight and bias must have one entry a channel");
    if (matrix) {
        require(matrix->shape(1) == x.shape(3) && matrix->shape(0) % lanes == 0 && matrix->shape(1) % lanes == 0,
                "the convolution's weight must be K × C, both multiples of 16");
        require(z->shape(0) == x.shape(0) && z->shape(1) == x.shape(1) && z->shape(2) == x.shape(2) && z->shape(3) == channels,
                "the convolution's result must be N × H × W × K");
        convolution = Dense{int(x.shape(3)), x.data(), matrix->data()};
    }
    if (factors)
        require(!matrix && factors->shape(0) == x.shape(0) && factors->shape(1) == channels, "the factors must be N × C, without a convolution");
    return {std::ptrdiff_t(x.size() / x.shape(3)), int(channels), z ? z->data() : x.data(), weight.data(), bias.data(), epsilon, relu,
            factors ? factors->data() : nullptr, std::ptrdiff_t(x.shape(1) * x.shape(2))};
}

void batch_norm_of(Image x, std::optional<Matrix> factors, std::optional<Matrix> matrix, std::optional<Result> z, Row weight, Row bias, std::optional<Image> residual, double epsilon,
                   bool relu, Result y, RowResult mean, RowResult variance, int threads) {
    std::optional<Dense> convolution;
    const BatchNorm norm = norm_of(x, factors, matrix, z, weight, bias, epsilon, relu, convolution);
    z ? check_alike(*z, y, "the output must be N × H × W × K") : check_alike(x, y, "the output must have the input's shape");
    if (residual) check_alike(y, *residual, "the residual must have the output's shape");
    require(mean.size() == weight.size() && variance.size() == weight.size(), "mean and variance must have one entry a channel");
    const nb::gil_scoped_release release;
    batch_norm(norm, convolution ? &*convolution : nullptr, z ? z->data() : nullptr, residual ? residual->data() : nullptr, y.data(), mean.data(),
               variance.data(), threads);
}

void batch_norm_gradient_of(Image dy, std::optional<Image> dshortcut, int shortcut_stride, Image x, std::optional<Matrix> factors, std::optional<Matrix> matrix, std::optional<Image> z,
                            Row weight, Row bias, std::optional<Image> y, Row mean, Row variance, double epsilon, bool relu, Result dx,
                            std::optional<Buffer<float, nb::ndim<2>>> dfactors, std::optional<Buffer<float, nb::ndim<2>>> dmatrix, std::optional<Result> dresidual, RowResult dweight, RowResult dbias, int threads) {
    std::optional<Dense> convolution;
    const BatchNorm norm = norm_of(x, factors, matrix, z, weight, bias, epsilon, relu, convolution);
    check_alike(x, dx, "the input's gradient must have its shape");
    check_alike(z ? *z : x, dy, "the output's gradient must have its shape");
    require(dmatrix.has_value() == matrix.has_value(), "a convolution's weight goes with its gradient");
    if (dmatrix)
        require(dmatrix->shape(0) == matrix->shape(0) && dmatrix->shape(1) == matrix->shape(1), "the gradient of the convolution's weight must be K × C");
    require(dfactors.has_value() == factors.has_value(), "the gradient of the factors goes with them");
    if (dfactors)
        require(dfactors->shape(0) == factors->shape(0) && dfactors->shape(1) == factors->shape(1), "the gradient of the factors must be N × C");
    require(y.has_value() == dresidual.has_value(), "the output goes with the gradient of a residual");
    if (y) check_alike(dy, *y, "the output must have its gradient's shape"), check_alike(dy, *dresidual, "the residual's gradient must have the output's shape");
    require(mean.size() == weight.size() && variance.size() == weight.size() && dweight.size() == weight.size() && dbias.size() == weight.size(),
            "mean, variance and the gradients of weight and bias must have one entry a channel");
    std::optional<Shortcut> shortcut;
    if (dshortcut) {
        require(matrix.has_value() && shortcut_stride >= 1, "a shortcut goes with a convolution, and has a stride of 1 or more");
        const std::size_t step = shortcut_stride;
        require(dshortcut->shape(0) == x.shape(0) && dshortcut->shape(1) == (x.shape(1) - 1) / step + 1 && dshortcut->shape(2) == (x.shape(2) - 1) / step + 1 &&
                    dshortcut->shape(3) == x.shape(3),
                "the shortcut's gradient must be N × H / stride × W / stride × C");
        shortcut = Shortcut{dshortcut->data(), int(x.shape(1)), int(x.shape(2)), shortcut_stride};
    }
    const Gradients to{dx.data(), dmatrix ? dmatrix->data() : nullptr, dresidual ? dresidual->data() : nullptr, dweight.data(), dbias.data(),
                       dfactors ? dfactors->data() : nullptr};
    const nb::gil_scoped_release release;
    batch_norm_gradient(norm, convolution ? &*convolution : nullptr, shortcut ? &*shortcut : nullptr, dy.data(), y ? y->data() : nullptr, mean.data(),
                        variance.data(), to, threads);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("instruction_sets", &instruction_sets);
    module.def("instruction_set", &instruction_set);
    module.def("set_instruction_set", &set_instruction_set, nb::arg("name"));
    module.def("threads_used", &threads_used);
    module.def(
        "fingerprint",
        [](const Weights &weights) {
            const nb::gil_scoped_release release;
            std::uint64_t number = 0xcbf29ce484222325;
            for (const Weight &weight : weights) number = fingerprint(weight.data(), weight.size(), number);
            return number;
        },
        nb::arg("weights").noconvert());
    nb::class_<Layer>(module, "Layer")
        .def(nb::init<int, int, const std::vector<int> &, const std::vector<int> &, int, bool,
                      std::vector<std::int32_t>, std::vector<std::int32_t>>(),
             nb::arg("in_channels"), nb::arg("out_channels"), nb::arg("kernel_sizes"), nb::arg("groups"),
             nb::arg("stride"), nb::arg("split"), nb::arg("in_order"), nb::arg("out_order"))
        .def("packed_size", &Layer::packed_size, nb::arg("backward"))
        .def("pack", &Layer::pack, nb::arg("weights").noconvert(), nb::arg("packed").noconvert(), nb::arg("backward"), nb::arg("threads"))
        .def("forward", &Layer::forward, nb::arg("x").noconvert(), nb::arg("packed").noconvert(),
             nb::arg("y").noconvert(), nb::arg("sums").noconvert(), nb::arg("ordered"), nb::arg("threads"))
        .def("infer_pointwise", &Layer::infer_pointwise, nb::arg("x").noconvert(), nb::arg("packed").noconvert(),
             nb::arg("bias").noconvert(), nb::arg("residual").none().noconvert(), nb::arg("y").noconvert(), nb::arg("relu"),
             nb::arg("threads"))
        .def("infer", &Layer::infer, nb::arg("x").noconvert(), nb::arg("packed").noconvert(),
             nb::arg("fc1_weight").noconvert(), nb::arg("fc1_bias").noconvert(), nb::arg("fc2_weight").noconvert(),
             nb::arg("fc2_bias").noconvert(), nb::arg("scale").noconvert(), nb::arg("shift").noconvert(),
             nb::arg("y").noconvert(), nb::arg("over_scales"), nb::arg("relu"), nb::arg("ordered"), nb::arg("threads"))
        .def("input_gradient", &Layer::input_gradient, nb::arg("dy").noconvert(), nb::arg("dsums").none().noconvert(),
             nb::arg("packed").noconvert(), nb::arg("dx").noconvert(), nb::arg("ordered"), nb::arg("threads"))
        .def("weight_gradient", &Layer::weight_gradient, nb::arg("x").noconvert(), nb::arg("dy").noconvert(),
             nb::arg("dsums").none().noconvert(), nb::arg("gradients").noconvert(), nb::arg("ordered"), nb::arg("threads"));
    module.def("batch_norm", &batch_norm_of, nb::arg("x").noconvert(), nb::arg("factors").none().noconvert(), nb::arg("matrix").none().noconvert(), nb::arg("z").none().noconvert(),
               nb::arg("weight").noconvert(), nb::arg("bias").noconvert(), nb::arg("residual").none().noconvert(), nb::arg("epsilon"),
               nb::arg("relu"), nb::arg("y").noconvert(), nb::arg("mean").noconvert(), nb::arg("variance").noconvert(), nb::arg("threads"));
    module.def("batch_norm_gradient", &batch_norm_gradient_of, nb::arg("dy").noconvert(), nb::arg("dshortcut").none().noconvert(),
               nb::arg("shortcut_stride"), nb::arg("x").noconvert(), nb::arg("factors").none().noconvert(), nb::arg("matrix").none().noconvert(), nb::arg("z").none().noconvert(),
               nb::arg("weight").noconvert(), nb::arg("bias").noconvert(), nb::arg("y").none().noconvert(), nb::arg("mean").noconvert(),
               nb::arg("variance").noconvert(), nb::arg("epsilon"), nb::arg("relu"), nb::arg("dx").noconvert(), nb::arg("dfactors").none().noconvert(), nb::arg("dmatrix").none().noconvert(),
               nb::arg("dresidual").none().noconvert(), nb::arg("dweight").noconvert(), nb::arg("dbias").noconvert(), nb::arg("threads"));
    module.def(
        "prefer_large_pages", [](Buffer<float, nb::ndim<1>> memory) { prefer_large_pages(memory.data(), memory.size()); },
        nb::arg("memory").noconvert());
    nb::class_<InferenceChain>(module, "Chain")
        .def(nb::init<>())
        .def("add_pointwise", &InferenceChain::add_pointwise, nb::arg("layer"), nb::arg("packed").noconvert(),
             nb::arg("bias").noconvert(), nb::arg("relu"), nb::arg("source"), nb::arg("residual"))
        .def("add_attention", &InferenceChain::add_attention, nb::arg("layer"), nb::arg("packed").noconvert(),
             nb::arg("fc1_weight").noconvert(), nb::arg("fc1_bias").noconvert(), nb::arg("fc2_weight").noconvert(),
             nb::arg("fc2_bias").noconvert(), nb::arg("scale").noconvert(), nb::arg("shift").noconvert(),
             nb::arg("over_scales"), nb::arg("relu"), nb::arg("ordered"), nb::arg("source"))
        .def("result_size", &InferenceChain::result_size, nb::arg("height"), nb::arg("width"))
        .def("run", &InferenceChain::run, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("threads"));
}
