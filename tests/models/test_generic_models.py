"""transformers' own generic tests of configurations and models, on DepthLM (see generic_suite.py)."""

import re
import unittest
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import generic_suite
from depthscope.models import DepthLMConfig, DepthLMForCausalLM, DepthLMModel

common = generic_suite.load("test_modeling_common")
config_common = generic_suite.load("test_configuration_common")
training = generic_suite.load("test_training_mixin")
tensor_parallel = generic_suite.load("test_tensor_parallel_mixin")
expert_parallel = generic_suite.load("test_expert_parallel_mixin")

# These run for a choice of architectures only.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES.add("depthlm")
expert_parallel.EP_DISTRIBUTED_TEST_MODEL_TYPES.add("depthlm")

# Tests of other kinds of models. They are skipped for DepthLM or, most of them, pass without building a model.
OTHER_KINDS = re.compile(
    "(?<!non_)composite|subconfig|encoder_decoder|_get_(text|image|audio|video)_features|vision|mismatched_shapes|problem_types"
    "|position_vector|feed_forward_chunking|partial_rotation|keep_in_fp32"
)


class ModelTester:
    """What the generic tests ask about the model: its configuration, inputs that fit it, and its classes."""

    batch_size, seq_length, vocab_size = 4, 7, 99
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True
    causal_lm_class = DepthLMForCausalLM

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def get_config(self) -> DepthLMConfig:
        return DepthLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DepthLMConfig, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Sequences of 1, 2, 3 and 4 tokens, then padding.
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def _filling(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with the from_pretrained that transformers' models have: missing weights are filled at random."""

    class Filling(model_class):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_pretrained(*args, allow_missing_keys=True, **kwargs)

    Filling.__name__ = model_class.__name__  # the tests look classes up by their names
    return Filling


class GenericTests(common.ModelTesterMixin, training.TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin):
    all_model_classes = (DepthLMModel, DepthLMForCausalLM)
    # The test goes by the year of the file's copyright line; DepthLM's files have none.
    test_can_init_all_missing_weights_before_2023 = True

    options: ClassVar[dict[str, Any]]
    # The beginnings of tests' names, and why these tests do not apply.
    not_applicable: ClassVar[dict[str, str]]

    def setUp(self):
        for name, reason in self.not_applicable.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        self.model_tester = ModelTester(self.options)

    def test_config(self):
        layers = {"num_hidden_layers": self.model_tester.num_hidden_layers}  # as many as options' lists have entries
        tester = config_common.ConfigTester(self, config_class=DepthLMConfig, **layers, **self.options)
        checks = [name for name in dir(tester) if name.startswith(("create_and_test_", "check_"))]
        assert checks
        for name in checks:
            with self.subTest(name):
                getattr(tester, name)()

    def test_can_init_all_missing_weights(self):
        # From an empty checkpoint, which DepthLM refuses.
        self.all_model_classes = tuple(_filling(model_class) for model_class in self.all_model_classes)
        super().test_can_init_all_missing_weights()

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("transformers' source distribution lacks its generic tests of generation")

    def test_sliding_window_mask(self):
        self.skipTest(
            "turns use_sliding_window on and off, which DepthLM lacks: its layer_types say which layers slide"
        )


def _drop_tests_that_cannot_apply(tests: type) -> None:
    for name in dir(tests):
        test = getattr(tests, name)
        if not name.startswith("test_") or not callable(test):
            continue
        # Those skipped want an accelerator, FlashAttention or DeepSpeed: dozens of lines in the summary of every run.
        if OTHER_KINDS.search(name) or getattr(test, "__unittest_skip__", False):
            setattr(tests, name, None)


_drop_tests_that_cannot_apply(GenericTests)

DENSE = {
    "test_eager_matches_batched_and_grouped_inference": "a dense model has no experts",
    "test_moe_parallel_plans_shard_experts": "a dense model has no experts",
    "test_moe_models_record_router_logits": "a dense model has no routers",
    "test_output_router_logits_from_config": "a dense model has no routers",
    "test_reverse_loading_mapping": "only experts are saved under other names",
}


class DenseTest(GenericTests, unittest.TestCase):
    options: ClassVar = {}
    not_applicable = DENSE


class PeriTest(GenericTests, unittest.TestCase):
    options: ClassVar = {
        "norm_placement": "peri",
        "norm_scaling": "depth",
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "qk_norm": "full",
    }
    not_applicable = DENSE


class MoeTest(GenericTests, expert_parallel.ExpertParallelTesterMixin, unittest.TestCase):
    options: ClassVar = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "moe_layers": 2,
        "qk_norm": "head",
    }
    not_applicable: ClassVar = {
        "test_training_gradient_checkpointing_use_reentrant_true": "refused: the router losses would have no gradient",
    }

    def test_moe_models_record_router_logits(self):
        # The test looks for this in the text of the model's file; DepthLM's experts are another model's.
        with patch.object(common.inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()
