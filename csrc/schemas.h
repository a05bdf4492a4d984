// Every op of the library, once: its schema, and the registration of its kernels for one device. Reading this file is
// reading the whole surface between Python and C++.
#pragma once

#include "gae.h"
#include "group.h"
#include "kept.h"
#include "kl.h"
#include "logprob.h"
#include "masked.h"
#include "ppo_loss.h"
#include "ppo_loss_from_logits.h"
#include "preference.h"

#define RLHF_FAST_SCHEMAS(m)                                                                                                        \
  m.def("gather_logprobs(Tensor logits, Tensor labels, Tensor? temperature, Tensor? mask, float temperature_value, "                \
        "float softcap, float logit_scale, int ignore_index, bool with_entropy, bool inplace_backward) "                           \
        "-> (Tensor, Tensor, Tensor)");                                                                                             \
  m.def("gather_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor? temperature, " \
        "Tensor? mask, Tensor row_stats, float temperature_value, float softcap, float logit_scale, int ignore_index) -> Tensor");  \
  m.def("gather_logprobs_backward_inplace(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor labels, "          \
        "Tensor? temperature, Tensor? mask, Tensor row_stats, float temperature_value, float softcap, float logit_scale, "          \
        "int ignore_index) -> ()");                                                                                                 \
  m.def("kept_logprobs(Tensor logits, Tensor labels, Tensor kept, Tensor? temperature, Tensor? mask, float temperature_value, "     \
        "float softcap, float logit_scale, int ignore_index, bool with_entropy, bool inplace_backward) "                            \
        "-> (Tensor, Tensor, Tensor)");                                                                                             \
  m.def("kept_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor kept, "           \
        "Tensor? temperature, Tensor? mask, Tensor row_stats, float temperature_value, float softcap, float logit_scale, "          \
        "int ignore_index) -> Tensor");                                                                                             \
  m.def("kept_logprobs_backward_inplace(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor labels, "            \
        "Tensor kept, Tensor? temperature, Tensor? mask, Tensor row_stats, float temperature_value, float softcap, "                \
        "float logit_scale, int ignore_index) -> ()");                                                                              \
  m.def("kl_penalty(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, bool straight_through, "                     \
        "float log_ratio_clip, float output_clip) -> Tensor");                                                                      \
  m.def("kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, "                      \
        "bool straight_through, float log_ratio_clip, float output_clip) -> Tensor");                                               \
  m.def("shape_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, Tensor? cu_seqlens, float kl_coef, "       \
        "int estimator, bool straight_through, float score_clip) -> Tensor");                                                       \
  m.def("shape_rewards_backward(Tensor grad, Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, "                    \
        "Tensor? cu_seqlens, float kl_coef, int estimator, bool straight_through, float score_clip) -> (Tensor, Tensor)");          \
  m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? bootstrap, Tensor? lam_rows, Tensor? returns_lam_rows, "          \
        "Tensor? cu_seqlens, float gamma, float lam, float returns_lam, bool decay) -> (Tensor, Tensor)");                          \
  m.def("gae_backward(Tensor grad_advantages, Tensor grad_returns, Tensor rewards, Tensor values, Tensor? mask, "                   \
        "Tensor? bootstrap, Tensor? lam_rows, Tensor? returns_lam_rows, Tensor? cu_seqlens, float gamma, float lam, "               \
        "float returns_lam, bool decay) -> (Tensor, Tensor, Tensor)");                                                              \
  m.def("group_advantages(Tensor rewards, int group_size, int scale, bool leave_one_out, float eps) -> (Tensor, Tensor)");          \
  m.def("group_advantages_backward(Tensor grad, Tensor rewards, Tensor moments, int group_size, int scale, bool leave_one_out, "    \
        "float eps) -> Tensor");                                                                                                    \
  m.def("masked_mean(Tensor x, Tensor mask, Tensor? cu_seqlens) -> (Tensor, Tensor)");                                              \
  m.def("masked_mean_backward(Tensor grad, Tensor mask, Tensor weight_sum, Tensor? cu_seqlens) -> Tensor");                         \
  m.def("masked_whiten(Tensor x, Tensor mask, bool shift_mean, bool unbiased, float eps) -> (Tensor, Tensor)");                     \
  m.def("masked_whiten_backward(Tensor grad, Tensor x, Tensor mask, Tensor whitening, bool shift_mean) -> Tensor");                 \
  m.def("ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "               \
        "float clip_low, float clip_high, float dual_clip, float log_ratio_clip, bool sequence_level, int form, int aggregate, "    \
        "Tensor? normalizer, float normalizer_value, bool need_advantages) "                                                         \
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");                                                                             \
  m.def("ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens, float clip, "           \
        "int aggregate, Tensor? normalizer, float normalizer_value, bool need_old_values, bool need_returns) "                      \
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");                                                                     \
  m.def("ppo_loss_backward(Tensor grad, Tensor slope, Tensor row_weight, Tensor? cu_seqlens) -> Tensor");                           \
  m.def("ppo_token_weights(Tensor labels, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, int ignore_index, int aggregate, "   \
        "Tensor? normalizer, float normalizer_value) -> (Tensor, Tensor, Tensor)");                                                 \
  m.def("ppo_loss_rows(Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs, Tensor "         \
        "weights, Tensor scale, Tensor? temperature, float temperature_value, float softcap, float logit_scale, int "               \
        "ignore_index, float clip_low, float clip_high, float dual_clip, float log_ratio_clip, int form, float entropy_coef, "      \
        "float kl_coef, int kl_estimator, bool straight_through, bool need_gradient, int plan) -> (Tensor, Tensor, Tensor)");       \
  m.def("ppo_loss_rows_inplace(Tensor(a!) logits, Tensor labels, Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs, "    \
        "Tensor weights, Tensor scale, Tensor? temperature, float temperature_value, float softcap, float logit_scale, int "        \
        "ignore_index, float clip_low, float clip_high, float dual_clip, float log_ratio_clip, int form, float entropy_coef, "      \
        "float kl_coef, int kl_estimator, bool straight_through, int plan) -> (Tensor, Tensor)");                                   \
  m.def("ppo_objective(Tensor logprobs, Tensor entropies, Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs, "           \
        "Tensor weights, Tensor? cu_seqlens, float clip_low, float clip_high, float dual_clip, float log_ratio_clip, "              \
        "bool sequence_level, int form, float entropy_coef, float kl_coef, int kl_estimator, bool straight_through, int aggregate, "\
        "Tensor? normalizer, float normalizer_value, bool wide) -> (Tensor, Tensor, Tensor, Tensor)");                              \
  m.def("ppo_loss_from_logits(Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? "         \
        "cu_seqlens, Tensor? ref_logprobs, Tensor? temperature, Tensor? normalizer, float temperature_value, float softcap, "       \
        "float logit_scale, int ignore_index, float clip_low, float clip_high, float dual_clip, float log_ratio_clip, bool "        \
        "sequence_level, int form, int aggregate, float normalizer_value, float entropy_coef, float kl_coef, int kl_estimator, "    \
        "bool straight_through, bool need_gradient, int plan) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");                        \
  m.def("ppo_loss_from_logits_inplace(Tensor(a!) logits, Tensor labels, Tensor old_logprobs, Tensor advantages, Tensor? mask, "     \
        "Tensor? cu_seqlens, Tensor? ref_logprobs, Tensor? temperature, Tensor? normalizer, float temperature_value, float "        \
        "softcap, float logit_scale, int ignore_index, float clip_low, float clip_high, float dual_clip, float log_ratio_clip, "    \
        "bool sequence_level, int form, int aggregate, float normalizer_value, float entropy_coef, float kl_coef, int "             \
        "kl_estimator, bool straight_through, int plan) -> (Tensor, Tensor, Tensor, Tensor)");                                      \
  m.def("ppo_scale_gradient(Tensor(a!) gradient, Tensor grad) -> ()");                                                              \
  m.def("reward_pair_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center_coef) -> (Tensor, Tensor, Tensor)");         \
  m.def("reward_pair_loss_backward(Tensor grad, Tensor chosen, Tensor rejected, Tensor slopes, float center_coef, "                 \
        "bool need_margin) -> (Tensor, Tensor, Tensor)");                                                                           \
  m.def("dpo_loss(Tensor chosen, Tensor rejected, Tensor ref_chosen, Tensor ref_rejected, float beta, float tilt, "                 \
        "int loss_type) -> (Tensor, Tensor, Tensor)");                                                                              \
  m.def("dpo_loss_backward(Tensor grad, Tensor slopes, bool need_chosen, bool need_rejected, bool need_ref_chosen, "                \
        "bool need_ref_rejected) -> (Tensor, Tensor, Tensor, Tensor)");                                                             \
  m.def("logprob_slice_statistics(Tensor logits, Tensor labels, Tensor? temperature, Tensor? mask, float temperature_value, "       \
        "float softcap, float logit_scale, int ignore_index, int vocab_start, int vocab, bool with_entropy) -> Tensor");            \
  m.def("logprob_slice_statistics_into(Tensor(a!) statistics, Tensor logits, Tensor labels, Tensor? temperature, Tensor? mask, "    \
        "float temperature_value, float softcap, float logit_scale, int ignore_index, int vocab_start, int vocab, "                 \
        "bool with_entropy) -> ()");                                                                                                \
  m.def("logprob_slices_combine(Tensor partials, Tensor labels, Tensor? temperature, Tensor? mask, float temperature_value, "       \
        "float softcap, float logit_scale, int ignore_index, bool with_entropy, bool wide) -> (Tensor, Tensor, Tensor)");           \
  m.def("logprob_slice_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor? temperature, "   \
        "Tensor? mask, Tensor row_stats, float temperature_value, float softcap, float logit_scale, int ignore_index, "             \
        "int vocab_start, int vocab) -> Tensor");                                                                                   \
  m.def("logprob_slice_backward_inplace(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor labels, "            \
        "Tensor? temperature, Tensor? mask, Tensor row_stats, float temperature_value, float softcap, float logit_scale, "          \
        "int ignore_index, int vocab_start, int vocab) -> ()")

#define RLHF_FAST_KERNELS(m, unit)                                                                            \
  m.impl("gather_logprobs", TORCH_BOX(&rlhf_fast::unit::gather_logprobs));                                    \
  m.impl("gather_logprobs_backward", TORCH_BOX(&rlhf_fast::unit::gather_logprobs_backward));                  \
  m.impl("gather_logprobs_backward_inplace", TORCH_BOX(&rlhf_fast::unit::gather_logprobs_backward_inplace));  \
  m.impl("kept_logprobs", TORCH_BOX(&rlhf_fast::unit::kept_logprobs));                                        \
  m.impl("kept_logprobs_backward", TORCH_BOX(&rlhf_fast::unit::kept_logprobs_backward));                      \
  m.impl("kept_logprobs_backward_inplace", TORCH_BOX(&rlhf_fast::unit::kept_logprobs_backward_inplace));      \
  m.impl("kl_penalty", TORCH_BOX(&rlhf_fast::unit::kl_penalty));                                              \
  m.impl("kl_penalty_backward", TORCH_BOX(&rlhf_fast::unit::kl_penalty_backward));                            \
  m.impl("shape_rewards", TORCH_BOX(&rlhf_fast::unit::shape_rewards));                                        \
  m.impl("shape_rewards_backward", TORCH_BOX(&rlhf_fast::unit::shape_rewards_backward));                      \
  m.impl("gae", TORCH_BOX(&rlhf_fast::unit::gae));                                                            \
  m.impl("gae_backward", TORCH_BOX(&rlhf_fast::unit::gae_backward));                                          \
  m.impl("group_advantages", TORCH_BOX(&rlhf_fast::unit::group_advantages));                                  \
  m.impl("group_advantages_backward", TORCH_BOX(&rlhf_fast::unit::group_advantages_backward));                \
  m.impl("masked_mean", TORCH_BOX(&rlhf_fast::unit::masked_mean));                                            \
  m.impl("masked_mean_backward", TORCH_BOX(&rlhf_fast::unit::masked_mean_backward));                          \
  m.impl("masked_whiten", TORCH_BOX(&rlhf_fast::unit::masked_whiten));                                        \
  m.impl("masked_whiten_backward", TORCH_BOX(&rlhf_fast::unit::masked_whiten_backward));                      \
  m.impl("ppo_policy_loss", TORCH_BOX(&rlhf_fast::unit::ppo_policy_loss));                                    \
  m.impl("ppo_value_loss", TORCH_BOX(&rlhf_fast::unit::ppo_value_loss));                                      \
  m.impl("ppo_loss_backward", TORCH_BOX(&rlhf_fast::unit::ppo_loss_backward));                                \
  m.impl("ppo_token_weights", TORCH_BOX(&rlhf_fast::unit::ppo_token_weights));                                \
  m.impl("ppo_loss_rows", TORCH_BOX(&rlhf_fast::unit::ppo_loss_rows));                                        \
  m.impl("ppo_loss_rows_inplace", TORCH_BOX(&rlhf_fast::unit::ppo_loss_rows_inplace));                        \
  m.impl("ppo_objective", TORCH_BOX(&rlhf_fast::unit::ppo_objective));                                        \
  m.impl("ppo_loss_from_logits", TORCH_BOX(&rlhf_fast::unit::ppo_loss_from_logits));                          \
  m.impl("ppo_loss_from_logits_inplace", TORCH_BOX(&rlhf_fast::unit::ppo_loss_from_logits_inplace));          \
  m.impl("ppo_scale_gradient", TORCH_BOX(&rlhf_fast::unit::ppo_scale_gradient));                              \
  m.impl("reward_pair_loss", TORCH_BOX(&rlhf_fast::unit::reward_pair_loss));                                  \
  m.impl("reward_pair_loss_backward", TORCH_BOX(&rlhf_fast::unit::reward_pair_loss_backward));                \
  m.impl("dpo_loss", TORCH_BOX(&rlhf_fast::unit::dpo_loss));                                                  \
  m.impl("dpo_loss_backward", TORCH_BOX(&rlhf_fast::unit::dpo_loss_backward));                                \
  m.impl("logprob_slice_statistics", TORCH_BOX(&rlhf_fast::unit::logprob_slice_statistics));                  \
  m.impl("logprob_slice_statistics_into", TORCH_BOX(&rlhf_fast::unit::logprob_slice_statistics_into));        \
  m.impl("logprob_slices_combine", TORCH_BOX(&rlhf_fast::unit::logprob_slices_combine));                      \
  m.impl("logprob_slice_backward", TORCH_BOX(&rlhf_fast::unit::logprob_slice_backward));                      \
  m.impl("logprob_slice_backward_inplace", TORCH_BOX(&rlhf_fast::unit::logprob_slice_backward_inplace))
