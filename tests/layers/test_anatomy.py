"""The layer stack: found by tracing, stood in for, and always restored."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    OlmoeConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from depthscope import AffineMap, LayerStack
from depthscope.errors import NoLayerStackError
from models import gemma_with_shared_keys_and_values

LAYERS, WIDTH, VOCABULARY = 4, 32, 90


def llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.2,
            **changes,
        }
    )


CONFIGS = {
    "llama": llama(),
    "gpt2": GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0),
    "bloom": BloomConfig(hidden_size=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY),
    "opt": OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=64,
    ),
    "gemma2": Gemma2Config(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        sliding_window=4,
    ),
    "olmoe": OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def llama_model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


def modules_and_hooks(model: nn.Module) -> list[tuple[str, int, int, int]]:
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_the_layers_are_the_decoder_layers(model: PreTrainedModel) -> None:
    stack = LayerStack(model)
    assert stack.num_layers == LAYERS
    assert list(stack.layers) == list(model.get_submodule(stack.path))
    assert stack.layers[0] is not stack.layers[1]


def test_tracing_leaves_no_trace(model: PreTrainedModel) -> None:
    model.train()
    before = modules_and_hooks(model)
    LayerStack(model)
    assert modules_and_hooks(model) == before
    assert all(module.training for module in model.modules())


def test_resuming_at_any_layer_gives_the_baseline(model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(model)
    with stack.capture() as seen:
        baseline = stack.logits(ids)
    kept, last = dict(seen.resid_pre), seen.resid_post[LAYERS - 1]
    assert stack.resumable
    for index in range(LAYERS + 1):
        with stack.resume_from(index, last if index == LAYERS else kept[index]):
            torch.testing.assert_close(stack.logits(ids), baseline, atol=1e-5, rtol=1e-5)


def test_resuming_runs_no_earlier_layer(llama_model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(llama_model)
    with stack.capture() as seen:
        stack.logits(ids)
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(stack.layers)
    ]
    with stack.resume_from(2, seen.resid_pre[2]):
        stack.run_through(2, ids)
    for handle in handles:
        handle.remove()
    assert ran == [2]


def test_resuming_with_another_hidden_state_changes_the_output(llama_model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(llama_model)
    with stack.capture() as seen:
        baseline = stack.logits(ids)
    with stack.resume_from(2, seen.resid_pre[2] * 2):
        assert not torch.allclose(stack.logits(ids), baseline, atol=1e-3)


def test_skipping_equals_a_model_without_the_layer(ids: Tensor) -> None:
    model = build("llama")
    shorter = copy.deepcopy(model)
    del shorter.model.layers[1]
    stack = LayerStack(model)
    with stack.skipping(1):
        torch.testing.assert_close(stack.logits(ids), shorter(ids, use_cache=False).logits)


def test_an_affine_stand_in_maps_the_hidden_state(model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(model)
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    with stack.replacing({2: AffineMap(weight, bias)}), stack.capture() as seen:
        stack.logits(ids)
    torch.testing.assert_close(seen.resid_post[2], seen.resid_pre[2] @ weight + bias)


def test_any_module_can_stand_in(llama_model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(llama_model)
    with stack.replacing({1: nn.Identity()}):
        as_identity = stack.logits(ids)
    with stack.skipping(1):
        torch.testing.assert_close(as_identity, stack.logits(ids))


def test_a_stand_in_has_the_attributes_of_its_layer(ids: Tensor) -> None:
    stack = LayerStack(build("gemma2"))
    with stack.skipping(1):
        assert stack.layers[1].self_attn is stack._trace.originals[1].self_attn
        with pytest.raises(AttributeError):
            _ = stack.layers[1].no_such_thing


def test_swapping_equals_a_model_with_the_layers_swapped(ids: Tensor) -> None:
    model = build("llama")
    other = copy.deepcopy(model)
    other.model.layers[0], other.model.layers[3] = other.model.layers[3], other.model.layers[0]
    stack = LayerStack(model)
    with stack.swapped(0, 3):
        torch.testing.assert_close(stack.logits(ids), other(ids, use_cache=False).logits)


def test_layers_of_different_kinds_do_not_change_places() -> None:
    stack = LayerStack(build("gemma2"))  # sliding and full attention in turn
    assert stack.layer_types[0] == stack.layer_types[2] != stack.layer_types[1]
    with pytest.raises(NoLayerStackError, match="different types"), stack.swapped(0, 1):
        pass
    with stack.swapped(0, 2):
        pass


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt, Interrupt])
def test_every_context_restores_the_model_whatever_happens(
    llama_model: PreTrainedModel, ids: Tensor, reason: type[BaseException]
) -> None:
    stack = LayerStack(llama_model)
    with stack.capture() as seen:
        baseline = stack.logits(ids)
    before, kept = modules_and_hooks(llama_model), dict(seen.resid_pre)
    contexts = {
        "skipping": lambda: stack.skipping(0, 2),
        "standing_in": lambda: stack.replacing({1: AffineMap(torch.eye(WIDTH), torch.zeros(WIDTH))}),
        "swapped": lambda: stack.swapped(1, 2),
        "resuming_at": lambda: stack.resume_from(3, kept[3]),
        "resuming_at_the_end": lambda: stack.resume_from(LAYERS, kept[3]),
        "stopping_after": lambda: stack.stopping_after(1),
        "stopping_after_the_last": lambda: stack.stopping_after(LAYERS - 1),
        "capturing": lambda: stack.capture(sublayers=True),
    }
    for name, context in contexts.items():
        with pytest.raises(reason), stack.skipping(2), context():
            raise reason
        assert modules_and_hooks(llama_model) == before, name
    torch.testing.assert_close(stack.logits(ids), baseline, atol=0, rtol=0)


def test_contexts_nest(llama_model: PreTrainedModel, ids: Tensor) -> None:
    stack = LayerStack(llama_model)
    baseline = stack.logits(ids)
    with stack.swapped(0, 1):
        outer = stack.logits(ids)
        with stack.skipping(0):
            with stack.swapped(2, 3), stack.skipping(3):
                stack.logits(ids)
            inner = stack.logits(ids)
        torch.testing.assert_close(stack.logits(ids), outer)
    torch.testing.assert_close(stack.logits(ids), baseline)
    assert not torch.allclose(inner, outer)


def test_sublayers_are_captured_where_there_are_any(ids: Tensor) -> None:
    stack = LayerStack(build("llama"))
    with stack.capture(sublayers=True) as seen:
        stack.logits(ids)
    for index in range(LAYERS):
        update = seen.resid_post[index] - seen.resid_pre[index]
        torch.testing.assert_close(seen.attn_out[index] + seen.mlp_out[index], update, atol=1e-5, rtol=1e-4)
    opt = LayerStack(build("opt"))  # its MLP is not a module of its own
    with opt.capture(sublayers=True) as seen:
        opt.logits(ids)
    assert sorted(seen.attn_out) == list(range(LAYERS))
    assert not seen.mlp_out


def test_gradient_checkpointing_and_training_mode_change_nothing(llama_model: PreTrainedModel, ids: Tensor) -> None:
    baseline = LayerStack(llama_model).logits(ids)
    llama_model.gradient_checkpointing_enable()
    llama_model.train()
    stack = LayerStack(llama_model)
    with stack.capture() as seen:
        torch.testing.assert_close(stack.logits(ids), baseline)
    with stack.resume_from(2, seen.resid_pre[2]):
        torch.testing.assert_close(stack.logits(ids), baseline)


def test_a_peft_model_is_analysed_with_its_adapter(llama_model: PreTrainedModel, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama_model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    stack = LayerStack(wrapped.eval())
    assert stack.num_layers == LAYERS
    with stack.capture() as seen:
        baseline = stack.logits(ids)
    with stack.resume_from(2, seen.resid_pre[2]):
        torch.testing.assert_close(stack.logits(ids), baseline)


def test_layers_that_are_offloaded_to_disk_are_found_and_resumed(
    llama_model: PreTrainedModel, ids: Tensor, tmp_path
) -> None:
    from accelerate import dispatch_model

    expected = llama_model(ids, use_cache=False).logits
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(LAYERS)}
    split = dispatch_model(llama_model, places, main_device="cpu", offload_dir=tmp_path)
    assert next(split.model.layers[1].parameters()).device.type == "meta"
    stack = LayerStack(split)
    with stack.capture() as seen:
        torch.testing.assert_close(stack.logits(ids), expected)
    with stack.resume_from(2, seen.resid_pre[2]):
        torch.testing.assert_close(stack.logits(ids), expected)
    with stack.skipping(1), stack.swapped(2, 3):
        assert torch.isfinite(stack.logits(ids)).all()


def test_layers_that_share_keys_and_values_are_run_from_the_start(ids: Tensor) -> None:
    stack = LayerStack(gemma_with_shared_keys_and_values())
    assert not stack.resumable
    assert stack.unskippable, "later layers read the keys and values of an earlier one"


def test_a_headless_model_is_refused() -> None:
    with pytest.raises(NoLayerStackError, match="AutoModelForCausalLM"):
        LayerStack(LlamaModel(llama()))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(NoLayerStackError, match="encoder-decoder"):
        LayerStack(T5ForConditionalGeneration(config))


def test_a_model_without_a_plain_stack_says_what_was_found(ids: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
            return self.layer(self.layer(hidden, **kwargs), **kwargs)

    model = build("llama")
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([Twice(layers[0]), layers[1], nn.Identity()])
    model.model.config.num_hidden_layers = 2  # the third one is never called
    with pytest.raises(NoLayerStackError, match=r"model\.layers: 3 x Twice"):
        LayerStack(model)


def test_a_layer_number_out_of_range_is_refused(llama_model: PreTrainedModel) -> None:
    stack = LayerStack(llama_model)
    with pytest.raises(IndexError, match="layers 0 to 3"), stack.skipping(4):
        pass


def test_bert_as_a_decoder_is_found(ids: Tensor) -> None:
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        is_decoder=True,
    )
    assert LayerStack(BertLMHeadModel(config).eval()).num_layers == LAYERS
