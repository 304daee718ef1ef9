// Autograd of the ops, in terms of registered ops. In C++, because a search step runs dozens of them, and
// formulas registered from Python cost each a flattening and checking of all its arguments.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/einsum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "given.h"

namespace pf {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

template <typename F>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using TwoTensors = std::tuple<Tensor, Tensor>;
const auto& gram_op() {
  static const auto f = op<TwoTensors(const Tensor&)>("proxyless_fast::gram");
  return f;
}
const auto& gate_dot_op() {
  static const auto f = op<Tensor(const Tensor&, const Tensor&)>("proxyless_fast::gate_dot");
  return f;
}

struct GramFunction : Function<GramFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [mean, cov] = gram_op().call(x);
    ctx->save_for_backward({x, mean});
    return {mean, cov};
  }
  // cov = (X - m)^T (X - m) / N, and the centred rows sum to zero: d cov passes to X through them alone.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[1];
    const at::Scalar pixels(x.sym_numel() / x.sym_size(1));
    const auto per_channel = [](const Tensor& t) { return t.unsqueeze(1).unsqueeze(2); };
    const Tensor symmetric = (grads[1] + grads[1].t()) / pixels;
    return {per_channel(grads[0] / pixels) + at::einsum("ij,bjhw->bihw", {symmetric, x - per_channel(mean)})};
  }
};

struct GateDotFunction : Function<GateDotFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({a, b});
    return gate_dot_op().call(a, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {grads[0] * saved[1], grads[0] * saved[0]};
  }
};

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
const auto& mbconv_op() {
  static const auto f =
      op<FourTensors(const Tensor&, at::TensorList, at::TensorList, const OptionalTensor&, const OptionalTensor&,
                     int64_t, std::string_view, bool, double, int64_t, bool, std::string_view)>(
          "proxyless_fast::mbconv");
  return f;
}
const auto& mbconv_backward_op() {
  static const auto f = op<std::tuple<Tensor, std::vector<Tensor>>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::TensorList, const OptionalTensor&,
      const OptionalTensor&, int64_t, std::string_view, bool, double, bool, bool, bool, std::string_view)>(
      "proxyless_fast::mbconv_backward");
  return f;
}

// The constants of an op, kept from forward to backward.
void keep_options(AutogradContext* ctx, int64_t stride, std::string_view activation, bool training, double eps) {
  ctx->saved_data["stride"] = stride;
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["training"] = training;
  ctx->saved_data["eps"] = eps;
}

// Backward of these ops is an op without a derivative of its own: to go on would give zeros where there are gradients.
void require_once(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(), op,
      ": can be differentiated once, and this backward was asked to be differentiable itself (create_graph=True); "
      "proxyless_fast.set_policy(net, 'off') runs torch's own ops, which can");
}

OptionalTensor defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct MBConvFunction : Function<MBConvFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList params, at::TensorList running,
                               const OptionalTensor& mean, const OptionalTensor& cov, int64_t stride,
                               std::string_view activation, bool training, double eps, int64_t keep, bool shortcut,
                               std::string_view group) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, y, d, statistics] =
        mbconv_op().call(x, params, running, mean, cov, stride, activation, training, eps, keep, shortcut, group);
    keep_options(ctx, stride, activation, training, eps);
    ctx->saved_data["group"] = std::string(group);
    ctx->saved_data["params"] = static_cast<int64_t>(params.size());
    ctx->saved_data["others"] = static_cast<int64_t>(running.size()) + 9;
    ctx->saved_data["shortcut"] = shortcut;
    variable_list saved = {x, y, d, statistics, mean.value_or(Tensor()), cov.value_or(Tensor())};
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    ctx->mark_non_differentiable({y, d, statistics});
    ctx->set_materialize_grads(false);
    return {out, y, d, statistics};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_once("mbconv");
    const auto count = static_cast<size_t>(ctx->saved_data["params"].toInt());
    variable_list result(1 + count + static_cast<size_t>(ctx->saved_data["others"].toInt()));
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const at::TensorList params = at::TensorList(saved).slice(6);
    bool weights = false;
    for (size_t i = 0; i < count; ++i) weights = weights || ctx->needs_input_grad(1 + i);
    auto [dx, dparams] = mbconv_backward_op().call(
        grads[0], saved[0], saved[1], saved[2], saved[3], params, defined(saved[4]), defined(saved[5]),
        ctx->saved_data["stride"].toInt(), ctx->saved_data["activation"].toStringView(),
        ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble(), ctx->needs_input_grad(0), weights,
        ctx->saved_data["shortcut"].toBool(), ctx->saved_data["group"].toStringView());
    if (ctx->needs_input_grad(0)) result[0] = dx;
    for (size_t i = 0; weights && i < count; ++i)
      if (ctx->needs_input_grad(1 + i)) result[1 + i] = dparams[i];
    return result;
  }
};

const auto& batch_norm_act_op() {
  static const auto f = op<TwoTensors(const Tensor&, const Tensor&, const Tensor&, at::TensorList, std::string_view,
                                      bool, double, std::string_view)>("proxyless_fast::batch_norm_act");
  return f;
}
const auto& batch_norm_act_backward_op() {
  static const auto f =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            std::string_view, bool, double, std::string_view)>(
          "proxyless_fast::batch_norm_act_backward");
  return f;
}

struct BatchNormActFunction : Function<BatchNormActFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               at::TensorList running, std::string_view activation, bool training, double eps,
                               std::string_view group) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, statistics] = batch_norm_act_op().call(x, weight, bias, running, activation, training, eps, group);
    keep_options(ctx, 1, activation, training, eps);
    ctx->saved_data["group"] = std::string(group);
    ctx->saved_data["others"] = static_cast<int64_t>(running.size()) + 4;
    ctx->save_for_backward({x, weight, bias, statistics});
    ctx->mark_non_differentiable({statistics});
    return {out, statistics};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_once("batch_norm_act");
    const auto saved = ctx->get_saved_variables();
    const auto [dx, dweight, dbias] = batch_norm_act_backward_op().call(
        grads[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["activation"].toStringView(),
        ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble(),
        ctx->saved_data["group"].toStringView());
    variable_list result = {dx, dweight, dbias};
    result.resize(3 + static_cast<size_t>(ctx->saved_data["others"].toInt()));
    return result;
  }
};

const auto& conv_op() {
  static const auto f = op<FourTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::TensorList,
                                       int64_t, std::string_view, bool, double)>("proxyless_fast::conv_norm_act");
  return f;
}
const auto& conv_backward_op() {
  static const auto f = op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, int64_t, std::string_view, bool, double)>("proxyless_fast::conv_norm_act_backward");
  return f;
}

struct ConvNormActFunction : Function<ConvNormActFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& gamma,
                               const Tensor& beta, at::TensorList running, int64_t stride, std::string_view activation,
                               bool training, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, statistics, mean, cov] =
        conv_op().call(x, weight, gamma, beta, running, stride, activation, training, eps);
    keep_options(ctx, stride, activation, training, eps);
    ctx->saved_data["others"] = static_cast<int64_t>(running.size()) + 4;
    ctx->save_for_backward({x, weight, gamma, beta, statistics, mean, cov});
    ctx->mark_non_differentiable({statistics, mean, cov});
    return {out, statistics, mean, cov};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_once("conv_norm_act");
    const auto saved = ctx->get_saved_variables();
    const auto [dweight, dgamma, dbeta] =
        conv_backward_op().call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                                ctx->saved_data["stride"].toInt(), ctx->saved_data["activation"].toStringView(),
                                ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble());
    variable_list result = {Tensor(), dweight, dgamma, dbeta};
    result.resize(4 + static_cast<size_t>(ctx->saved_data["others"].toInt()));
    return result;
  }
};

TwoTensors gram(const Tensor& x) {
  require_given("gram", "x", x);
  auto r = GramFunction::apply(x);
  return {r[0], r[1]};
}
Tensor gate_dot(const Tensor& a, const Tensor& b) {
  require_given("gate_dot", "a", a);
  require_given("gate_dot", "b", b);
  return GateDotFunction::apply(a, b);
}
FourTensors mbconv(const Tensor& x, at::TensorList params, at::TensorList running, const OptionalTensor& mean,
                   const OptionalTensor& cov, int64_t stride, std::string_view activation, bool training, double eps,
                   int64_t keep, bool shortcut, std::string_view group) {
  require_given("mbconv", "x", x);
  auto r =
      MBConvFunction::apply(x, params, running, mean, cov, stride, activation, training, eps, keep, shortcut, group);
  return {r[0], r[1], r[2], r[3]};
}
TwoTensors batch_norm_act(const Tensor& x, const Tensor& weight, const Tensor& bias, at::TensorList running,
                          std::string_view activation, bool training, double eps, std::string_view group) {
  require_given("batch_norm_act", "x", x);
  require_given("batch_norm_act", "weight", weight);
  require_given("batch_norm_act", "bias", bias);
  auto r = BatchNormActFunction::apply(x, weight, bias, running, activation, training, eps, group);
  return {r[0], r[1]};
}
FourTensors conv_norm_act(const Tensor& x, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                          at::TensorList running, int64_t stride, std::string_view activation, bool training,
                          double eps) {
  require_given("conv_norm_act", "x", x);
  require_given("conv_norm_act", "weight", weight);
  require_given("conv_norm_act", "gamma", gamma);
  require_given("conv_norm_act", "beta", beta);
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && x.requires_grad()),
                    "conv_norm_act: x must not need a gradient; a convolution inside a net runs as torch's own");
  auto r = ConvNormActFunction::apply(x, weight, gamma, beta, running, stride, activation, training, eps);
  return {r[0], r[1], r[2], r[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, Autograd, m) {
  m.impl("gram", &gram);
  m.impl("gate_dot", &gate_dot);
  m.impl("mbconv", &mbconv);
  m.impl("batch_norm_act", &batch_norm_act);
  m.impl("conv_norm_act", &conv_norm_act);
}

}  // namespace pf
